"""The checkpoint reader against torch.load, and against files that are damaged or hostile."""

import io
import json
import pickle
import random
import shutil
import tracemalloc
import zipfile
from collections import OrderedDict

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ferret_mlx.checkpoint import open_checkpoint

_BITS = {torch.bfloat16: (torch.int16, mx.int16)}


def same(ours: mx.array, theirs: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit."""
    if str(ours.dtype).split(".")[-1].rstrip("_") != str(theirs.dtype).split(".")[-1]:
        return False
    if theirs.dtype in _BITS:
        theirs, ours = theirs.view(_BITS[theirs.dtype][0]), ours.view(_BITS[theirs.dtype][1])
    return np.array_equal(np.array(ours), theirs.numpy())


def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 10)
    flat = torch.arange(24, dtype=torch.float16)
    return OrderedDict(
        float32=torch.randn(5, 7),
        float16=torch.randn(4, 3).half(),
        bfloat16=torch.randn(3, 8).bfloat16(),
        int64=torch.arange(12).reshape(3, 4) - 2**40,
        uint8=torch.arange(7, dtype=torch.uint8),
        boolean=torch.tensor([True, False, True]),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 4),
        transposed=torch.randn(4, 9).bfloat16().t(),
        stepped=base[1::2, 2:9:3],
        whole=base,
        first=flat[:8].reshape(2, 4),
        second=flat[8:].reshape(4, 4).permute(1, 0),
        parameter=torch.nn.Parameter(torch.randn(3), requires_grad=False),
    )


@pytest.fixture
def saved(tmp_path):
    """A folder with one pytorch_model.bin, and the tensors in it."""
    tensors = state_dict()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    return tmp_path, tensors


def write_zip(folder, pickled: bytes, records: dict[str, bytes] | None = None):
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, value in (records or {}).items():
            archive.writestr("archive/" + key, value)


def test_tensors_equal_torchs(saved):
    """Catches ignored strides and offsets, a shared storage read from its start, and bfloat16
    read as float16."""
    folder, tensors = saved
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.names() == list(tensors)
        for name, tensor in tensors.items():
            assert checkpoint.info(name).shape == tuple(tensor.shape)
            ours = checkpoint.read(name)
            assert ours.dtype == checkpoint.info(name).dtype
            assert same(ours, tensor), name


@pytest.mark.parametrize("order", [1, -1])
def test_order_of_reading_does_not_matter(saved, order):
    """The first read of a storage checks it whole, later ones take the short way."""
    folder, tensors = saved
    with open_checkpoint(folder) as checkpoint:
        for name in list(tensors)[::order] * 2:
            assert same(checkpoint.read(name), tensors[name]), name


def test_float64_comes_as_float32(tmp_path):
    torch.save({"x": torch.tensor([1.5, 0.1], dtype=torch.float64)}, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.info("x").dtype == mx.float32
        assert np.array_equal(np.array(checkpoint.read("x")), np.float32([1.5, 0.1]))


def test_state_dict_of_a_module(tmp_path):
    """A module's state dict carries attributes (`_metadata`) that a plain dict does not."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        for name, tensor in module.state_dict().items():
            assert same(checkpoint.read(name), tensor)


def test_parameters(tmp_path):
    tensors = {"p": torch.nn.Parameter(torch.randn(2, 3))}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert same(checkpoint.read("p"), tensors["p"].detach())


def test_parity_checkpoint_and_shards(parity):
    for folder in ("checkpoint", "checkpoint/vision_tower", "delta/base", "delta/delta"):
        theirs = {}
        for file in sorted((parity / folder).glob("*.bin")):
            theirs |= torch.load(file, weights_only=True)
        with open_checkpoint(parity / folder) as checkpoint:
            assert set(checkpoint.names()) == set(theirs)
            assert all(same(checkpoint.read(name), theirs[name]) for name in theirs)


def test_safetensors_single_and_sharded(tmp_path):
    tensors = {name: t.detach().clone().contiguous() for name, t in state_dict().items()}
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    single.mkdir()
    sharded.mkdir()
    save_file(tensors, single / "model.safetensors")
    weight_map = {}
    for i, part in enumerate((list(tensors)[:5], list(tensors)[5:])):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, sharded / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (sharded / "model.safetensors.index.json").write_text(index)
    for folder in (single, sharded):
        with open_checkpoint(folder) as checkpoint:
            assert set(checkpoint.names()) == set(tensors)
            assert all(same(checkpoint.read(name), tensors[name]) for name in tensors)


class Call:
    """Pickles to a call, as a hostile checkpoint would."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["value", "key", "whole", "nested"])
def test_foreign_names_are_refused_and_not_run(tmp_path, protocol, where):
    """Catches an unpickler that looks a name up, or calls it, before it refuses."""
    mark = tmp_path / "was-run"
    for function, args in ((eval, (f"open({str(mark)!r}, 'w')",)), (mark.touch, ())):
        call = Call(function, *args)
        value = {
            "value": {"x": call},
            "key": {call: 1},
            "whole": call,
            "nested": OrderedDict(x=[{"y": (call,)}]),
        }[where]
        write_zip(tmp_path, pickle.dumps(value, protocol))
        with pytest.raises(
            ValueError, match=r"pytorch_model\.bin: its pickle names \w+\."
        ) as error:
            open_checkpoint(tmp_path)
        assert not mark.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"(S'true'\nios\nsystem\n.",
        b"(cos\nsystem\nS'true'\no.",
        b"ctorch\nload\n.",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"ccollections\nOrderedDict.fromkeys\n.",
        b"\x80\x02\x82\x01.",
        b"Pos.system\n.",
    ],
)
def test_hostile_opcodes(tmp_path, opcodes):
    """Every opcode that can bring in a name: GLOBAL, STACK_GLOBAL, INST, OBJ, EXT1, PERSID."""
    write_zip(tmp_path, opcodes)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)


class Ref:
    """A reference to a storage, pickled as torch does."""

    def __init__(self, numel=4, key="0", kind=torch.FloatStorage):
        self.pid = ("storage", kind, key, "cpu", numel)


def tensor_pickle(ref, offset=0, shape=(4,), strides=(1,), state=None) -> bytes:
    class Tensor:
        def __reduce__(self):
            rest = (False, OrderedDict())
            call = (torch._utils._rebuild_tensor_v2, (ref, offset, shape, strides, *rest))
            return call if state is None else (*call, state)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.pid if isinstance(value, Ref) else None

    out = io.BytesIO()
    Pickler(out, 2).dump({"x": Tensor()})
    return out.getvalue()


FOUR = np.arange(4, dtype=np.float32).tobytes()


def test_handmade_checkpoint_is_read(tmp_path):
    """The refusals below would prove nothing if this one did not load."""
    write_zip(tmp_path, tensor_pickle(Ref()), {"data/0": FOUR})
    with open_checkpoint(tmp_path) as checkpoint:
        assert np.array_equal(np.array(checkpoint.read("x")), [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("pickled", "records"),
    [
        (tensor_pickle(Ref(), shape=(5,)), {"data/0": FOUR}),
        (tensor_pickle(Ref(), offset=1), {"data/0": FOUR}),
        (tensor_pickle(Ref(), offset=-1), {"data/0": FOUR}),
        (tensor_pickle(Ref(), strides=(2,)), {"data/0": FOUR}),
        (tensor_pickle(Ref(), strides=(-1,)), {"data/0": FOUR}),
        (tensor_pickle(Ref(), strides=(1, 1)), {"data/0": FOUR}),
        (tensor_pickle(Ref(), shape=(2**40,), strides=(0,)), {"data/0": FOUR}),
        (tensor_pickle(Ref(), shape=("4",)), {"data/0": FOUR}),
        (tensor_pickle(Ref(), shape=4), {"data/0": FOUR}),
        (tensor_pickle(Ref(), state={"offset": 2**30}), {"data/0": FOUR}),
        (tensor_pickle(Ref(), state=(None, {"offset": 2**30})), {"data/0": FOUR}),
        (tensor_pickle(Ref(numel=8)), {"data/0": FOUR}),
        (tensor_pickle(Ref(key="1")), {"data/0": FOUR}),
        (tensor_pickle(Ref(key="../byteorder")), {"data/0": FOUR, "byteorder": b"little"}),
        (tensor_pickle(Ref(kind=torch.UntypedStorage)), {"data/0": FOUR}),
        (tensor_pickle(Ref()), {"data/0": FOUR, "byteorder": b"big"}),
        (tensor_pickle(Ref()), {"data/0": FOUR, "constants.pkl": b""}),
        (pickle.dumps({"x": 1}), {}),
        (pickle.dumps({1: 2}), {}),
        (pickle.dumps([1, 2]), {}),
        (pickle.dumps({"x": OrderedDict()}), {}),
        (b"", {}),
        (b"\x80\x02}q\x00", {}),
    ],
)
def test_malformed_contents(tmp_path, pickled, records):
    """Catches reads beyond a storage (through shapes, strides, or attributes that a pickle sets
    after the check), storages of another size, and contents that are no tensors."""
    write_zip(tmp_path, pickled, records)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin") as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_an_ordered_dict_with_attributes_of_its_own(tmp_path):
    """Catches a reader that calls methods which the pickle has replaced."""

    class Dict:
        def __reduce__(self):
            replaced = {"items": OrderedDict(), "keys": OrderedDict()}
            return OrderedDict, (), replaced, None, iter([("x", 1)])

    write_zip(tmp_path, pickle.dumps(Dict()))
    with pytest.raises(ValueError, match="entry 'x' is a int"):
        open_checkpoint(tmp_path)


def test_truncated_anywhere(saved, tmp_path_factory):
    folder, _ = saved
    data = (folder / "pytorch_model.bin").read_bytes()
    cuts = {0, 1, 3, 4, 29, 30, 64, len(data) - 1, len(data) - 22}
    cuts |= set(range(0, len(data), len(data) // 50))
    for cut in sorted(cuts):
        (folder / "pytorch_model.bin").write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            open_checkpoint(folder)


def test_flipped_bits_never_change_a_value(saved):
    """Every flip is either found, or in a byte that means nothing (padding, dates)."""
    folder, tensors = saved
    path = folder / "pytorch_model.bin"
    data = path.read_bytes()
    generator, found = random.Random(0), 0
    for _ in range(600):
        damaged = bytearray(data)
        damaged[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            with open_checkpoint(folder) as checkpoint:
                read = {name: checkpoint.read(name) for name in checkpoint.names()}
        except ValueError as error:
            assert "pytorch_model.bin" in str(error)
            found += 1
        else:
            assert set(read) == set(tensors)
            assert all(same(read[name], tensors[name]) for name in tensors)
    assert found > 100


def test_flipped_bit_in_a_storage_names_the_tensor(saved):
    folder, tensors = saved
    path = folder / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    at = data.index(tensors["whole"].numpy().tobytes())
    data[at + 100] ^= 1
    path.write_bytes(data)
    with open_checkpoint(folder) as checkpoint:
        assert same(checkpoint.read("float32"), tensors["float32"])
        with pytest.raises(ValueError, match=r"CRC-32 of the storage of whole"):
            checkpoint.read("whole")


def test_one_tensor_does_not_load_the_file(tmp_path):
    """Catches a reader that holds a whole shared storage to return a row of it, and one that
    loses its place where a tensor crosses from one read (16 MiB) into the next."""
    big = torch.randint(256, (64 << 20,), dtype=torch.uint8)
    row = slice((32 << 20) - 500, (32 << 20) + 500)
    torch.save({"row": big[row], "all": big}, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        tracemalloc.start()
        first = checkpoint.read("row")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 48 << 20
        assert same(first, big[row]) and same(checkpoint.read("row"), big[row])
        assert same(checkpoint.read("all"), big)


def test_other_files(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="before 1.6"):
        open_checkpoint(tmp_path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        open_checkpoint(tmp_path)
    for content in (b"", b"<html>", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            open_checkpoint(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        open_checkpoint(tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", tensor_pickle(Ref()))
    with pytest.raises(ValueError, match="compressed"):
        open_checkpoint(tmp_path)


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no index"):
        open_checkpoint(tmp_path)


@pytest.fixture
def sharded(parity, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(parity / "delta" / "base", folder)
    return folder


def test_missing_and_truncated_shards(sharded):
    shard = sharded / "pytorch_model-00002-of-00003.bin"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"lacks pytorch_model-00002-of-00003\.bin, which holds"):
        open_checkpoint(sharded)
    shard.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00003\.bin is truncated"):
        open_checkpoint(sharded)


def test_index_at_odds_with_the_shards(sharded):
    path = sharded / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"holds model\.norm\.weight"):
        open_checkpoint(sharded)
    index["weight_map"] |= {"model.norm.weight": shard, "model.other": shard}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks model\.other"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": 3}}']
    + [json.dumps({"weight_map": {"x": file}}) for file in ("../w.bin", "/etc/passwd", "", "..")],
)
def test_malformed_index(sharded, content):
    (sharded / "pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json|lacks"):
        open_checkpoint(sharded)


def test_malformed_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.arange(6.0), "y": torch.arange(3)}, path)
    data = path.read_bytes()
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path)
    for entry in (
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
        {"dtype": "F32", "shape": [4]},
        "text",
    ):
        header = json.dumps({"x": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + FOUR)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "rest"),
    [
        (([0, 8], [4, 12]), 0),
        (([0, 8], [12, 20]), 0),
        (([0, 8], [8, 16]), 4),
        (([4, 12], [12, 20]), 0),
    ],
    ids=["overlap", "gap", "trailing bytes", "gap at the start"],
)
def test_safetensors_of_the_right_sizes_in_wrong_places(tmp_path, offsets, rest):
    """Catches a damaged header that would only shift the values of a tensor."""
    names = zip("xy", offsets, strict=True)
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": o} for name, o in names}
    header = json.dumps(header).encode()
    data = bytes(max(end for _, end in offsets) + rest)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shape", [[2**31], [0, 2**40], [float("inf")], [[[]]]])
def test_impossible_shapes(tmp_path, shape):
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
    path.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_blocks_are_the_tensor(tmp_path, suffix):
    """Catches rows that are lost, doubled or read at another's place, in strided tensors too."""
    tensors = state_dict()
    if suffix == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        plain = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
        save_file(plain, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            for rows in (1, 2, 3, 5, 100):
                blocks = list(checkpoint.blocks(name, rows))
                if tensor.ndim == 0:
                    assert len(blocks) == 1 and same(blocks[0], tensor)
                    continue
                assert [len(block) for block in blocks[:-1]] == [rows] * (len(blocks) - 1)
                if len(tensor):
                    assert same(mx.concatenate(blocks), tensor), name
                else:
                    assert not blocks


def test_unknown_tensor(saved):
    with open_checkpoint(saved[0]) as checkpoint:
        for ask in (checkpoint.info, checkpoint.read):
            with pytest.raises(ValueError, match="holds no tensor nothing"):
                ask("nothing")
