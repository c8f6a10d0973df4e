"""Stores serve a table's rows from wherever they are: the same bytes, whoever asks and whenever."""

import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mole import Decoder, LutStore, MoleForCausalLM, convert, open_lut
from mole.kernels.admit import admit
from mole.lut import (
    STORES,
    CachedStore,
    ComputeStore,
    DiskStore,
    LutIdError,
    LutMeta,
    LutTruncatedError,
    cached,
    disk,
)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("wrong", [60, -1])
def test_ids_out_of_range_are_named(fp16, store, wrong):
    with pytest.raises(LutIdError, match=f"between 0 and 59.*got ids from {min(2, wrong)} to"):
        open_lut(fp16, store=store).rows(torch.tensor([[2, wrong]]))


def test_unknown_store_and_closed_store_are_refused(fp16):
    with pytest.raises(ValueError, match=r"`store` must be one of 'mmap', .*; got 'tape'"):
        open_lut(fp16, store="tape")
    for kind in STORES:
        store = open_lut(fp16, store=kind, cache=2 if kind == "disk" else 0)
        store.close()
        with pytest.raises(ValueError, match="was closed"):
            store.rows(torch.tensor([1]))


def test_all_stores_serve_the_same_bytes(table, make_mole):
    model = make_mole(lookup_layers=[0, 2])
    fmt = LutMeta.load(table).format
    stores = {kind: open_lut(table, store=kind) for kind in STORES}
    computed = ComputeStore(model, fmt)
    for kind in ("mmap", "disk"):
        stores[f"cached {kind}"] = open_lut(table, store=kind, cache=3)
    for ids in ([[3, 0, 59], [3, 3, 17]], [[59]], [[1, 2, 3, 4, 5, 3]], []):
        ids = torch.tensor(ids, dtype=torch.long)
        expected = stores["mmap"].read(ids.flatten())
        if len(ids):  # products of other shapes round otherwise
            exact = stores["mmap"].rows(ids).decode(torch.float32)
            step = {"nf3": 0.4, "nf4": 0.31}.get(fmt, 0.15) * exact.abs().amax()
            assert (computed.rows(ids).decode(torch.float32) - exact).abs().max() <= step
        for name, store in stores.items():
            assert isinstance(store, LutStore), name
            assert torch.equal(store.read(ids.flatten()), expected), name
            ticket = store.prefetch(ids)
            assert torch.equal(ticket.rows().to_bytes(store.meta), expected), name
    rows = [59, 0, 7]
    expected = stores["mmap"].read(torch.tensor(rows))
    for name, store in stores.items():
        out = torch.zeros_like(expected)
        store.read_into(rows, list(out))
        assert torch.equal(out, expected), name
    for store in stores.values():
        store.close()


def test_disk_reads_long_rows_in_pieces(make_mole, tmp_path):
    convert(make_mole(num_lookup_experts=210), tmp_path, "fp32", chunk=7, progress=False)
    store = open_lut(tmp_path / "lut", store="disk")
    assert store.meta.row_stride > 64 * 1024
    ids = torch.tensor([7, 59, 0])
    assert torch.equal(store.read(ids), open_lut(tmp_path / "lut").read(ids))


def test_refused_direct_reads_warn_and_work(fp16, monkeypatch):
    monkeypatch.setattr(os, "O_DIRECT", 1 << 40, raising=False)
    real = os.open

    def refuse(path, flags, *rest):
        if flags & 1 << 40:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match="direct reads are not supported"):
        store = DiskStore(fp16)
    assert not store.direct
    ids = torch.tensor([5, 5, 1])
    assert torch.equal(store.read(ids), open_lut(fp16).read(ids))


@pytest.mark.parametrize("direct", [True, False])
def test_memory_for_reads_is_used_again_and_never_shared(fp16, direct):
    table = open_lut(fp16).read(torch.arange(60))
    store = DiskStore(fp16, direct=direct)
    ticket = store.prefetch(torch.tensor([7, 8]))
    kept = []
    for first in range(0, 57, 3):
        ids = torch.tensor([first, first + 2, first])
        kept.append((ids, store.read(ids)))
    assert len(store._spare) == 2 * direct  # as many as one request has distinct rows
    assert all(torch.equal(rows, table[ids]) for ids, rows in kept)
    for _ in range(2):  # a ticket's rows stay what they are
        assert torch.equal(ticket.rows().to_bytes(store.meta), table[[7, 8]])
    store.close()


def test_what_the_page_cache_lacks_is_read_by_threads(fp16, monkeypatch):
    table = open_lut(fp16).read(torch.arange(60))
    monkeypatch.setattr(os, "RWF_NOWAIT", 1 << 30, raising=False)  # refused by the system
    store = DiskStore(fp16, direct=False)
    ids = torch.tensor([59, 3, 3, 0])
    assert torch.equal(store.read(ids), table[ids])
    assert store._pool._threads
    store.close()


def test_rows_that_are_waited_for_need_no_threads_where_the_system_reads_aside(fp16, monkeypatch):
    table = open_lut(fp16).read(torch.arange(60))
    ids = torch.tensor([59, 3, 3, 0, 21])
    store = DiskStore(fp16, threads=2)  # fewer at a time than rows
    if store._aio is None:
        pytest.skip("this system does not read aside")
    assert torch.equal(store.read(ids), table[ids])
    assert not store._pool._threads
    store.close()

    def refuse(*arguments):
        raise OSError("not here")

    monkeypatch.setattr(disk, "AsyncReads", refuse)
    store = DiskStore(fp16, threads=2)
    assert torch.equal(store.read(ids), table[ids])
    assert store._pool._threads
    store.close()


def test_an_interrupted_read_does_not_answer_the_next(fp16, monkeypatch):
    table = open_lut(fp16).read(torch.arange(60))
    store = DiskStore(fp16)
    if store._aio is None:
        pytest.skip("this system does not read aside")
    call = store._aio._call

    def interrupt(number, *arguments):
        if number == store._aio._reap:
            raise KeyboardInterrupt
        return call(number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store._aio, "_call", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.read(torch.tensor([5, 6, 7]))
    for _ in range(3):
        ids = torch.tensor([40, 2])
        assert torch.equal(store.read(ids), table[ids])
    store.close()


def test_a_read_that_fails_is_an_error(fp16):
    store = DiskStore(fp16)
    if store._aio is None:
        pytest.skip("this system does not read aside")
    with pytest.raises(OSError, match=r"Bad address|Invalid argument"):
        store._aio.read([(4096, 4096, 0)])  # no memory of ours
    assert len(store.read(torch.tensor([1]))) == 1
    store.close()


@pytest.mark.parametrize("aside", [True, False])
def test_a_file_that_shrinks_while_open_is_noticed(fp16, aside):
    store = DiskStore(fp16)
    store._aio = store._aio if aside else None
    with open(fp16 / "lut.safetensors", "r+b") as file:
        file.truncate(8192)
    with pytest.raises(LutTruncatedError, match="truncated while open"):
        store.read(torch.tensor([59]))


def test_cache_keeps_what_is_used(fp16):
    store = CachedStore(open_lut(fp16), capacity=2)
    for ids, hits, misses in (([1, 2], 0, 2), ([1, 1], 1, 2), ([3], 1, 3), ([1], 2, 3)):
        store.read(torch.tensor(ids))
        assert (store.hits, store.misses) == (hits, misses)
    with pytest.raises(ValueError, match="`capacity` must be at least 1; got 0"):
        CachedStore(open_lut(fp16), capacity=0)


@pytest.mark.parametrize("cache", [0, 1, 16])
@pytest.mark.parametrize("kind", STORES)
def test_threads_that_share_a_store_get_their_own_rows(fp16, kind, cache):
    expected = open_lut(fp16).read(torch.arange(60))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        store = open_lut(fp16, store=kind, cache=cache)

        def right(seed):
            generator = torch.Generator().manual_seed(seed)
            asked = [torch.randint(0, 60, (6,), generator=generator) for _ in range(40)]
            return all(torch.equal(store.read(ids), expected[ids]) for ids in asked)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(right, range(4)))
    finally:
        sys.setswitchinterval(before)
        store.close()


@pytest.mark.parametrize("staged", [2, 64])
@pytest.mark.parametrize("capacity", [1, 4, 7, 60])
def test_a_cache_never_gives_a_slot_to_two_rows(fp16, monkeypatch, capacity, staged):
    monkeypatch.setattr(cached, "_STAGED", staged)
    table = open_lut(fp16).read(torch.arange(60))
    store = CachedStore(open_lut(fp16), capacity)
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 60):
        ids = torch.randint(0, 60, (count % 11 + 1,), generator=generator)
        assert torch.equal(store.read(ids), table[ids])
        slots = list(store._slot.values())
        assert len(set(slots)) == len(slots) <= capacity
        for row, slot in store._slot.items():
            assert torch.equal(store.table[slot], table[row])


@pytest.mark.parametrize("capacity", [6, 13, 60])
def test_leased_slots_are_those_of_the_ids(fp16, capacity):
    table = open_lut(fp16).read(torch.arange(60))
    store = CachedStore(open_lut(fp16), capacity)
    landing = torch.zeros(7, table.shape[1], dtype=torch.uint8)
    out = torch.zeros_like(landing)
    generator = torch.Generator().manual_seed(0)

    def fetched(ids):
        with store.lease() as find:
            slots, landed = (torch.tensor(part) for part in find(ids.tolist(), list(landing)))
            admit(store.table, slots, landing, landed, out[: len(ids)])
        assert torch.equal(store.table[slots], table[ids])
        return out[: len(ids)]

    for count in range(200):
        ids = torch.randint(0, 60, (count % 6 + 1,), generator=generator)
        assert torch.equal(fetched(ids), table[ids])
    assert store.hits + store.misses <= 200 * 3.5
    assert store.misses >= 60 if capacity < 60 else store.misses == 60
    ids = torch.arange(7)
    if capacity < 7:
        with (
            pytest.raises(ValueError, match="at most 6 distinct ids, the cache's slots; got 7"),
            store.lease() as find,
        ):
            find(ids.tolist(), list(landing))
    for bad in (-1, 60):
        with pytest.raises(LutIdError, match="between 0 and 59"), store.lease() as find:
            find([bad], list(landing))
    assert torch.equal(fetched(ids[:1]), table[:1])  # an error leaves no lock behind
    store.close()
    with pytest.raises(ValueError, match="was closed"), store.lease():
        pass


def test_rows_that_did_not_get_into_their_slots_are_found_again(fp16):
    table = open_lut(fp16).read(torch.arange(60))
    store = CachedStore(open_lut(fp16), 4)
    store.read(torch.tensor([1, 2]))
    landing = torch.zeros(3, table.shape[1], dtype=torch.uint8)

    def copies_nothing():
        with store.lease() as find:
            find([2, 3, 4], list(landing))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copies_nothing()
    assert torch.equal(store.read(torch.arange(5)), table[:5])


def test_a_store_that_is_forgotten_closes_its_file(fp16):
    files = Path("/proc/self/fd")
    if not files.is_dir():
        pytest.skip("needs /proc")
    store = open_lut(fp16, store="disk")
    opened = os.readlink(files / str(store._file))
    store.read(torch.arange(9))
    threads = list(store._pool._threads)
    del store
    gc.collect()
    for thread in threads:
        thread.join(timeout=10)
    links = [os.path.realpath(file) for file in files.iterdir()]
    assert opened not in links
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("end", ["closed", "forgotten"])
def test_memory_is_unlocked_before_it_is_given_back(fp16, monkeypatch, end):
    locked, where = [], torch.device("cpu", 0)  # stands for a GPU

    class Runtime:
        def cudaHostRegister(self, address, size, flags):
            locked.append(address)
            return 0

        def cudaHostUnregister(self, address):
            locked.remove(address)

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    store = open_lut(fp16, store="pinned")
    for _ in range(2):
        store.lock(where)
    assert locked == [store.table.data_ptr()]
    with pytest.raises(ValueError, match="`ids` must be on cpu:0, the store's; got cpu:1"):
        store.lock(torch.device("cpu", 1))
    if end == "closed":
        store.close()
        with pytest.raises(ValueError, match="was closed"):
            store.lock(where)
    del store
    gc.collect()
    assert locked == []


@pytest.mark.parametrize("fmt", ["fp16", "nf3"])
def test_parts_of_a_row_cover_it_in_the_order_of_layers(fmt):
    meta = LutMeta(5, 7, 3, 8, fmt, 5, (), "")
    for counts in ((), (1, 5), (1, 2, 2, 2), (7, 7), (0, 3)):
        groups = list(meta.spans(counts))
        assert groups[0][0] == 0
        assert [first for first, _ in groups] == sorted({first for first, _ in groups})
        there = set()
        for (first, parts), following in zip(groups, [*groups[1:], (7, None)], strict=True):
            assert all(edge % 8 == 0 for part in parts for edge in part)
            there |= {byte for part in parts for byte in range(*part)}
            needed = meta.code_bytes // 7 * following[0]
            assert there >= set(range(needed))
            assert there >= set(range(meta.code_bytes, meta.row_bytes))
            assert first < following[0]


@pytest.mark.parametrize("kind", [*STORES, "cached"])
def test_a_long_text_takes_each_distinct_row_once(fp16, kind, monkeypatch):
    cache = {"cache": 4} if kind == "cached" else {}
    model = MoleForCausalLM.from_pretrained(fp16.parent).eval()
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(20, (9, 30), generator=generator)  # longer than what is not looked at
    with torch.no_grad():
        expected = model(text, lut_rows=model.lut.rows(text)).logits
    model.open_lut(fp16, "mmap" if cache else kind, **cache)
    asked, read = [], type(model.lut).read
    monkeypatch.setattr(
        type(model.lut), "read", lambda self, ids: asked.append(len(ids)) or read(self, ids)
    )
    with torch.no_grad():
        assert torch.equal(model(text).logits, expected)
    assert len(model.lut.fetch(text).index) == 270
    assert model.lut.fetch(text[:1]).index is None
    assert asked == [20, 20, 30] or kind == "disk"  # it reads each row once itself
    with pytest.raises(LutIdError, match="got ids from 0 to 60"):
        model.lut.fetch(torch.arange(300).clamp(max=60))
    model.lut.close()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", STORES)
def test_a_model_may_move_to_the_gpu_after_its_table_was_opened(fp16, tokens, kind):
    model = MoleForCausalLM.from_pretrained(fp16.parent, lut_store=kind).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    tokens = tokens.cuda()
    assert torch.equal(model.cuda().generate(tokens, **options).cpu(), expected)
    assert torch.equal(Decoder(model, 2, 24).generate(tokens, 8).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [0, 3])
def test_pinned_rows_reach_the_gpu(table, cache):
    store = open_lut(table, store="pinned", device="cuda", cache=cache)
    ids = torch.tensor([[3, 0, 59], [3, 3, 17]])
    expected = open_lut(table).rows(ids)
    found = store.prefetch(ids.cuda()).rows()
    assert torch.equal(found.codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8))
    text = torch.randint(60, (300,), generator=torch.Generator().manual_seed(0))
    rows = store.fetch(text.cuda())  # long enough to look for repeated ids
    assert len(rows.codes) == len(text.unique())
    for number, (codes, scales, index) in enumerate(rows.layers(torch.float32)):
        wanted = open_lut(table).rows(text)
        assert torch.equal(codes[index].cpu(), wanted.codes[:, number])
        assert scales is None or torch.equal(scales[index].cpu(), wanted.scales[:, number])
    if not cache:
        store.rows(torch.tensor([60], device="cuda"))
        with pytest.raises(LutIdError, match="zeros were used"):
            store.check()
    store.close()
