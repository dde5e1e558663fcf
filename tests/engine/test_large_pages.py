"""Large pages: what is moved into them stays what it is, and who cannot have them goes without."""

import ctypes
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from inferflux.engine import large_pages
from inferflux.engine.layers.linear import Linear
from inferflux.kernels.kernel_set import select

MIB = 2**20


class Packed(NamedTuple):
    values: torch.Tensor
    scales: torch.Tensor | None


class Model:
    """As those of the engine: attributes, slots, lists, tuples, and a way back to where one came from."""

    def __init__(self) -> None:
        self.layers = [Packed(torch.arange(3 * MIB), None), Packed(torch.ones(2 * MIB), torch.ones(3))]
        self.head = Linear(select(torch.device("cpu"), torch.float32), torch.ones(64, 4))
        self.itself = self
        self.elsewhere = torch.empty(4 * MIB, device="meta")


Model.__module__ = "inferflux.engine.somewhere"


class Libc:
    """The system's madvise, whose calls are noted: address, length and advice."""

    argtypes: tuple[type, ...] = ()

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self._madvise = ctypes.CDLL(None).madvise

    @property
    def madvise(self) -> "Libc":
        return self

    def __call__(self, address: int, length: int, advice: int) -> None:
        self._madvise.argtypes = self.argtypes
        self._madvise(address, length, advice)
        self.calls.append((address, length, advice))


def test_a_models_memory_moves_and_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system need not give any: not before Linux 6.1, nor while its memory is in pieces or in use; and it may split
    again what it has moved. But it is asked for each, by the number that Linux gave the advice."""
    model, libc, size = Model(), Libc(), large_pages._page_size()
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda _: libc)
        thread = large_pages.collapse_in_background(model)
        if thread is None or size is None:
            pytest.skip("this system has no large pages")
        thread.join()
    assert torch.equal(model.layers[0].values, torch.arange(3 * MIB))
    assert torch.equal(model.layers[1].values, torch.ones(2 * MIB))
    assert torch.equal(model.head(torch.ones(1, 4)), torch.full((1, 64), 4.0))
    assert libc.calls == [(page * size, size, 25) for page in large_pages._full_pages(model, size)]
    assert len(libc.calls) >= 24 * MIB // size - 1


def test_pages_are_those_that_are_mostly_weights() -> None:
    model = Model()
    size = 4096
    pages = large_pages._full_pages(model, size)
    address = model.layers[0].values.data_ptr()
    inside = range(-(-address // size), (address + 24 * MIB) // size)
    assert set(inside) <= set(pages)
    head = model.head._packed.weight
    assert not {tensor.data_ptr() // size for tensor in head if isinstance(tensor, torch.Tensor)} & set(pages)
    everything = sum(tensor.nbytes for tensor in large_pages._tensors(model, set()))
    assert len(pages) <= everything // (size * 0.75)


def test_a_shared_storage_counts_once() -> None:
    model = Model()
    pages = large_pages._full_pages(model, 4096)
    model.layers.append(Packed(model.layers[0].values[:MIB], None))
    assert large_pages._full_pages(model, 4096) == pages
    # Counted twice, it would fill a page that it fills by 60 %.
    assert large_pages._full_pages([model.layers[1].values, model.layers[1].values.view(-1)], 14 * MIB) == []


@pytest.mark.parametrize(
    ("enabled", "size"),
    [("always madvise [never]\n", "2097152\n"), (None, None), ("[always] madvise never\n", "none\n")],
    ids=["unwanted", "unknown", "unreadable"],
)
def test_where_there_are_none_nothing_is_asked_for(
    enabled: str | None, size: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, content in (("enabled", enabled), ("hpage_pmd_size", size)):
        if content is not None:
            (tmp_path / name).write_text(content)
    monkeypatch.setattr(large_pages, "_SETTINGS", tmp_path)
    assert large_pages.collapse_in_background(Model()) is None


def test_a_system_that_knows_no_such_advice_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("[always] madvise never\n")
    (tmp_path / "hpage_pmd_size").write_text(f"{2 * MIB}\n")
    monkeypatch.setattr(large_pages, "_SETTINGS", tmp_path)
    monkeypatch.setattr(large_pages, "_COLLAPSE", 9999)
    thread = large_pages.collapse_in_background(Model())
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()
