"""Control groups within control groups: the narrowest limit counts, wherever it is set."""

from pathlib import Path

import pytest

from inferflux.engine.runner import control_groups, cpu_quota, memory


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of groups; what /proc/self/cgroup says is in a file beside it."""
    (tmp_path / "root").mkdir()
    monkeypatch.setattr(control_groups.folders, "__defaults__", (tmp_path / "root", tmp_path / "membership"))
    return tmp_path / "root"


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_a_units_limits_and_those_of_its_slice_count(root: Path) -> None:
    """As `MemoryMax` and `CPUQuota` set them; without, the engine took a share of the whole machine's memory."""
    (root.parent / "membership").write_text("0::/some.slice/our.service\n")
    write(root / "some.slice", memory__max=5000, memory__current=4900, memory__stat="inactive_file 0")
    write(root / "some.slice/our.service", memory__max=1000, memory__current=100, memory__stat="inactive_file 200")
    write(root / "some.slice/other.service", memory__max=10, memory__current=10, memory__stat="inactive_file 0")
    write(root / "some.slice", cpu__max="400000 100000")
    write(root / "some.slice/our.service", cpu__max="250000 100000")
    write(root / "some.slice/other.service", cpu__max="10000 100000")
    assert memory._cgroup_available(root) == 100
    assert cpu_quota.cpu_quota(root) == 2.5


def test_version_1_has_a_tree_for_each_controller(root: Path) -> None:
    (root.parent / "membership").write_text("4:memory:/ours\n1:cpu,cpuacct:/ours/inner\n0::/\n")
    write(root / "memory/ours", memory__limit_in_bytes=900, memory__usage_in_bytes=300, memory__stat="anon 5")
    write(root / "cpu/ours", cpu__cfs_quota_us=150_000, cpu__cfs_period_us=100_000)
    write(root / "cpu/ours/inner", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100_000)
    assert (memory._cgroup_available(root), cpu_quota.cpu_quota(root)) == (600, 1.5)


@pytest.mark.parametrize("membership", ["0::/../../elsewhere\n", "0::/gone\n", "nonsense\n", ""])
def test_a_group_that_is_not_seen_is_not_looked_for(membership: str, root: Path) -> None:
    """Beside a container, or of a path that is the host's; the container's own is at the root."""
    (root.parent / "membership").write_text(membership)
    write(root.parent / "elsewhere", cpu__max="100000 100000")
    write(root, cpu__max="300000 100000")
    assert cpu_quota.cpu_quota(root) == 3
