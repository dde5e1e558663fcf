"""The folder: which files belong to a checkpoint, and that an index can name nothing outside it."""

import pytest

from inferflux.engine.weights.checkpoint import Checkpoint
from inferflux.errors import ModelLoadError
from tests.support.checkpoints import entry, file_bytes, write_shards

A = file_bytes({"a": entry()}, bytes(8))
B = file_bytes({"b": entry()}, bytes(8))


def test_one_file_and_shards_hold_the_same(tmp_path):
    write_shards(
        tmp_path, {"x-1.safetensors": A, "x-2.safetensors": B}, {"a": "x-1.safetensors", "b": "x-2.safetensors"}
    )
    with Checkpoint(tmp_path) as checkpoint:
        assert {name: file.path.name for name, (file, _) in checkpoint.tensors.items()} == {
            "a": "x-1.safetensors",
            "b": "x-2.safetensors",
        }
    (tmp_path / "model.safetensors").write_bytes(A)
    with Checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a"], "a single file comes before an index"


def test_symbolic_links_are_followed(tmp_path):
    """Hub caches keep files under their digest elsewhere and link to them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / "digest").write_bytes(A)
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/digest")
    with Checkpoint(tmp_path / "snapshot") as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "x.bin", "a\\x.safetensors", "\0.safetensors",
     "", 3, None, ["x"]],
)  # fmt: skip
def test_index_names_only_safetensors_of_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(A)
    write_shards(folder, {}, {"a": name})
    with pytest.raises(ModelLoadError, match=r"must name \.safetensors files of its own folder"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("shards", "weight_map", "words"),
    [
        ({"x.safetensors": A}, {"a": "x.safetensors", "b": "y.safetensors"}, "y.safetensors: is not a file"),
        ({"x.safetensors": A}, {"a": "x.safetensors", "b": "x.safetensors"}, "'b' is not in x.safetensors"),
        ({"x.safetensors": A, "y.safetensors": B}, {"a": "y.safetensors", "b": "x.safetensors"}, "is not in"),
        ({"x.safetensors": A, "y.safetensors": A}, {"a": "x.safetensors", "b": "y.safetensors"}, "is in"),
        ({}, {}, "weight_map: must be an object"),
        ({}, ["x.safetensors"], "weight_map: must be an object"),
        ({}, {str(i): f"{i}.safetensors" for i in range(1000)}, "at most 512 files"),
    ],
)
def test_index_and_files_must_agree(tmp_path, shards, weight_map, words):
    write_shards(tmp_path, shards, weight_map)
    with pytest.raises(ModelLoadError) as caught:
        Checkpoint(tmp_path)
    assert words in str(caught.value)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelLoadError, match=r"never read: convert them to safetensors"):
        Checkpoint(tmp_path)
