"""Where the limits of this process's control groups are: of a container, a pod, or a service's unit and its slices."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

ROOT: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")


def folders(controller: str, root: Path = ROOT, membership: Path = _MEMBERSHIP) -> Iterator[Path]:
    """Yields the folders of the groups that the process is in, outermost first: version 2's, then version 1's.

    Each limits it. A container sees its own group as the root. Some folders may not exist.
    """
    groups: dict[str, PurePosixPath] = {}
    try:
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            groups |= dict.fromkeys(controllers.split(","), PurePosixPath(path))
    except (OSError, ValueError):
        pass  # no Linux
    for base, name in ((root, ""), (root / controller, controller)):
        yield base
        group = groups.get(name, PurePosixPath("/"))
        # One that is outside of what this container sees has `..` in its path.
        for depth in range(1, 1 if ".." in group.parts else len(group.parts)):
            yield base.joinpath(*group.parts[1 : depth + 1])
