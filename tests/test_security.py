"""Nothing that is loaded can run code, read another file or leave its folder: an exploit is planted in each format."""

import ast
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, read_json, state_of, vouch
from torch_files import write_torch

from unet.commands import cli
from unet.config import TrainSettings, TuneSettings, unflat
from unet.data.decode import photo
from unet.data.manifest import MANIFEST, Manifest
from unet.data.pictures import Unusable
from unet.data.preparing.pieces import read_table
from unet.data.preparing.verify import verify
from unet.data.shards import Prepared
from unet.data.sources.archives import extract
from unet.data.sources.description import describe
from unet.errors import InputError
from unet.models.torch_file import read_torch
from unet.runs.arrays import arrays_file, weights_file
from unet.runs.checkpoint import Checkpoints
from unet.storage import Folder
from unet.supervise.preflight import _identify
from unet.tuning.space import parse_space

SMALL = unflat(
    TrainSettings, {"image_size": 16, "base_filters": 2, "depth": 1, "batch_size": 2, "precision": "float32"}
)
RECIPE = SMALL.recipe(3)
SHAPES = RECIPE.network.variables
OTHERS = {name: shape for name, shape in RECIPE.variables.items() if not name.startswith("weights/")}
NAME, KERNEL, LAYER = "step_00000000", "encoder_1_conv_1/kernel", "encoder_1_conv_2"


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def checkpoint(run: Path) -> Path:
    """A run with one whole checkpoint of zeros; the checkpoint's folder."""
    folder = run / "checkpoints" / NAME
    folder.mkdir(parents=True)
    weights, others = ({name: np.zeros(shape, np.float32) for name, shape in of.items()} for of in (SHAPES, OTHERS))
    (folder / "model.weights.h5").write_bytes(weights_file(weights, RECIPE.network.keras_paths).getbuffer())
    (folder / "optimizer.npz").write_bytes(arrays_file(others).getbuffer())
    (folder / "state.json").write_text(json.dumps(asdict(state_of(SMALL, variables=RECIPE.variables))))
    vouch(folder)
    return folder


def refused(run: Path, words: str) -> None:
    """Though its marker vouches for it: whoever plants something can make that as well."""
    vouch(run / "checkpoints" / NAME)
    with pytest.raises(InputError, match=words):
        Checkpoints(Folder(run)).resume(SMALL)


def test_a_whole_one_is_accepted(tmp_path):
    checkpoint(tmp_path)
    assert Checkpoints(Folder(tmp_path)).resume(SMALL)[0][0] == NAME


def pickled_array(path: Path, canary: Path):
    arrays = dict(np.load(path))
    arrays["loss_scale"] = np.array(Exploit(canary), object)
    np.savez(path, **arrays)


def plain_pickle(path: Path, canary: Path):
    path.write_bytes(pickle.dumps(Exploit(canary)))


def pickle_in_a_zip(path: Path, canary: Path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in OTHERS:
            archive.writestr(f"{name}.npy", pickle.dumps(Exploit(canary)))


@pytest.mark.parametrize("plant", [pickled_array, plain_pickle, pickle_in_a_zip])
def test_an_optimizer_that_is_pickled_is_not_unpickled(tmp_path, canary, plant):
    plant(checkpoint(tmp_path) / "optimizer.npz", canary)
    refused(tmp_path, r"\(optimizer.npz: ")


class Named:
    """Pickled, it is a call of what it names, with an array as any file of weights has it beside it."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize(
    "planted",
    [
        lambda canary: Exploit(canary),
        lambda canary: Named(eval, f"open({str(canary)!r}, 'w')"),
        lambda canary: Named(getattr, "a", "upper"),
        lambda canary: Named(np.zeros, 3),
        lambda canary: Named(bytearray, 10**12),
    ],
)
def test_a_file_of_weights_names_nothing_but_arrays(tmp_path, canary, planted, is_archive):
    arrays = {"a.weight": np.ones(3, np.float32)}
    assert read_torch(write_torch(tmp_path / "good.pth", arrays, is_archive)).keys() == arrays.keys()
    path = tmp_path / "bad.pth"
    write_torch(path, arrays | {"more": planted(canary)}, is_archive)
    with pytest.raises(InputError, match=r"bad\.pth is not a file of weights alone: it asks for \w"):
        read_torch(path)


def test_a_packed_array_is_not_unpacked(tmp_path):
    path = checkpoint(tmp_path) / "optimizer.npz"
    np.savez_compressed(path, **dict(np.load(path)))
    refused(tmp_path, "is packed")


def soft_link(file, other):
    file["elsewhere"] = h5py.SoftLink(f"/{KERNEL}")


def external_link(file, other):
    del file[KERNEL]
    file[KERNEL] = h5py.ExternalLink(str(other), "/kernel")


def external_group(file, other):
    del file[LAYER]
    file[LAYER] = h5py.ExternalLink(str(other), "/group")


def unused_external_link(file, other):
    file["more"] = h5py.ExternalLink(str(other), "/kernel")


def external_storage(file, other):
    del file[KERNEL]
    file.create_dataset(KERNEL, SHAPES[KERNEL], np.float32, external=[(str(other), 0, h5py.h5f.UNLIMITED)])


def virtual(file, other):
    del file[KERNEL]
    layout = h5py.VirtualLayout(SHAPES[KERNEL], np.float32)
    layout[:] = h5py.VirtualSource(str(other), "kernel", SHAPES[KERNEL])
    file.create_virtual_dataset(KERNEL, layout)


def filtered(file, other):
    values = file[KERNEL][()]
    del file[KERNEL]
    file.create_dataset(KERNEL, data=values, compression="gzip")


def texts(file, other):
    del file[KERNEL]
    file.create_dataset(KERNEL, SHAPES[KERNEL], h5py.string_dtype())


def references(file, other):
    del file[KERNEL]
    file.create_dataset(KERNEL, SHAPES[KERNEL], h5py.ref_dtype)


WEIGHTS = {
    soft_link: "is a link",
    external_link: "is a link",
    external_group: "is a link",
    unused_external_link: "is a link",
    external_storage: "not stored plainly",
    virtual: "not stored plainly",
    filtered: "not stored plainly",
    texts: "holds object",
    references: "holds object",
}


@pytest.mark.parametrize("plant", WEIGHTS, ids=lambda plant: plant.__name__)
def test_weights_that_lie_elsewhere_are_refused(tmp_path, plant):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["kernel"] = np.full(SHAPES[KERNEL], 7, np.float32)
        for name in ("kernel", "bias"):
            file[f"group/{name}"] = np.full(SHAPES[f"{LAYER}/{name}"], 7, np.float32)
    with h5py.File(checkpoint(tmp_path) / "model.weights.h5", "a") as file:
        plant(file, other)
    refused(tmp_path, rf"\(model.weights.h5: .*{WEIGHTS[plant]}")


def yaml_of(canary: Path) -> str:
    return f"classes: !!python/object/apply:os.mknod ['{canary}']\n"


def test_yaml_makes_no_objects(tmp_path, canary):
    text = yaml_of(canary)
    (tmp_path / "settings.yaml").write_text(text)
    (tmp_path / "dataset.yaml").write_text(text)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    readings = {
        "--config": lambda: cli.parse(TrainSettings, "", [f"--config={tmp_path}/settings.yaml"]),
        "config.yaml": lambda: cli.parse(TrainSettings, "", ["--resume=run", f"--storage-path={tmp_path}"]),
        "run/config.yaml": lambda: _identify(
            unflat(TrainSettings, {"run_name": "run", "storage_path": str(tmp_path)}),
        ),
        "The space x": lambda: parse_space(text, "x", unflat(TuneSettings, {})),
        "dataset.yaml": lambda: describe(tmp_path),
    }
    for what, read in readings.items():
        with pytest.raises(InputError, match=rf"{what}.* is not valid YAML: could not determine a constructor"):
            read()


@pytest.mark.parametrize(
    "text", ["!!timestamp x", "!!bool x", "!!int x", "[" * 10_000, "\0", "a: !!binary x", "{[1]: 2}"]
)
def test_yaml_that_is_none_is_a_sentence(tmp_path, text):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(InputError, match=r"--config .*settings.yaml is not valid YAML"):
        cli.parse(TrainSettings, "", [f"--config={tmp_path}/settings.yaml"])


@pytest.mark.parametrize("text", ["{", "[1]", "3", "[" * 10**5])
def test_a_damaged_summary_is_a_sentence(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(text)
    with pytest.raises(InputError, match=r"summary.json is damaged: bring back a copy of it, or remove it"):
        _identify(unflat(TrainSettings, {"run_name": "run", "storage_path": str(tmp_path)}))


def pickled_column(rows: int, canary: Path) -> pa.Array:
    """A column of the type that Ray Data registers for Python objects: reading a value unpickles it."""
    import ray.data  # noqa: F401
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    kind = ArrowPythonObjectType()
    return kind.wrap_array(pa.array([pickle.dumps(Exploit(canary))] * rows, kind.storage_type))


@pytest.fixture(scope="module")
def shards(ray_cluster, packed, tmp_path_factory) -> Path:
    from unet.data.preparing.pieces import Recipe
    from unet.data.preparing.prepare import prepare

    target = tmp_path_factory.mktemp("whole") / "shards"
    prepare(str(packed), Folder(target), Recipe(32))
    return target


@pytest.mark.parametrize("column", ["name", "image", "nested"])
def test_shards_of_pickled_columns_are_refused(shards, tmp_path, canary, column):
    folder = Path(shutil.copytree(shards, tmp_path / "shards"))
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        planted = pickled_column(len(table), canary)
        if column == "nested":
            planted = pa.StructArray.from_arrays([planted], ["inner"])
        place = max(0, table.column_names.index(column) if column in table.column_names else 0)
        pq.write_table(table.set_column(place, table.column_names[place], planted), path, row_group_size=256)
    pq.read_table(folder / "samples.parquet")[0].to_pylist()
    assert canary.exists()  # the exploit is alive
    canary.unlink()
    prepared = Prepared(Folder(folder))
    for read in (lambda: prepared.read_chunk("train", 0), lambda: prepared.names("test"), prepared.samples):
        with pytest.raises(InputError, match=r"is not of a plain type\): remove .* and prepare the data again"):
            read()
    assert any(words.startswith("has changed") for _, words in verify(Folder(folder), lambda *_: None))


def test_pieces_of_pickled_columns_are_refused(tmp_path, canary):
    table = pa.table({"name": pickled_column(2, canary)})
    with pa.OSFile(str(tmp_path / "piece.arrow"), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(pa.ArrowInvalid, match="is not of a plain type"):
        read_table(Folder(tmp_path), "piece.arrow")


@pytest.mark.parametrize("name", ["../secret.parquet", "/tmp/secret.parquet", "a/b.parquet", "..", ""])
def test_a_manifest_names_only_files_beside_it(shards, tmp_path, name):
    content = read_json(shards / MANIFEST)
    del content["manifest_digest"]
    for change in ({"files": content["files"] | {"val": [name]}}, {"sha256": content["sha256"] | {name: "0" * 64}}):
        (tmp_path / MANIFEST).write_text(Manifest(**content | change).to_json())
        with pytest.raises(
            InputError, match=r"manifest.json is damaged \(it names '.*', which is not a file beside it"
        ):
            Prepared(Folder(tmp_path))


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", content: bytes = b"") -> tuple:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(content)
    return info, io.BytesIO(content)


ARCHIVES = {
    "up": [member("images/../../../canary", content=b"x")],
    "absolute": [member("{tmp}/canary", content=b"x")],
    "through a link": [member("images/out", tarfile.SYMTYPE, "{tmp}"), member("images/out/canary", content=b"x")],
    "through a link of a link": [
        member("images/a", tarfile.SYMTYPE, "."),
        member("images/b", tarfile.SYMTYPE, "a/.."),
        member("images/b/../../canary", content=b"x"),
    ],
    "a link that stays": [member("images/x.jpg", tarfile.SYMTYPE, "y.jpg")],
    "a link to a file": [member("images/x.jpg", tarfile.SYMTYPE, "{tmp}/secret")],
    "a hard link to a file": [member("images/x.jpg", tarfile.LNKTYPE, "{tmp}/secret")],
    "a device": [member("images/x.jpg", tarfile.CHRTYPE)],
    "a pipe": [member("images/x.jpg", tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_stays_in_its_folder(tmp_path, canary, kind):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "pets"
    folder.mkdir()
    for name in ("images", "annotations"):
        with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as tar:
            tar.addfile(*member(name, tarfile.DIRTYPE))
            for info, content in ARCHIVES[kind] if name == "images" else []:
                info.name, info.linkname = (text.format(tmp=tmp_path) for text in (info.name, info.linkname))
                content.seek(0)
                tar.addfile(info, content)
    with pytest.raises(InputError, match=r"Cannot unpack .*images.tar.gz: .* Fetch the archive again"):
        extract(folder, tmp_path / "target", lambda *_: None)
    assert not [p for p in (tmp_path / "target").rglob("*") if not p.is_dir()]


def test_a_photo_starts_no_program(tmp_path, monkeypatch):
    """PostScript that is named as a photo, which Pillow would hand to Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **options: pytest.fail("Ghostscript"))
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(Unusable, match=r"a\.jpg cannot be decoded: it is not a picture of a known format"):
        photo(str(tmp_path / "a.jpg"), lambda name: Path(name).read_bytes())


def test_the_code_calls_nothing_that_could_load_code():
    """The list of what reads is short; whoever adds to it meets this test."""
    loaders = {"load", "loads", "eval", "exec", "load_model", "extractall", "unsafe_load", "full_load", "read_pickle"}
    found = set()
    for path in [*(ROOT / "unet").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                if call.rpartition(".")[2] in loaders:
                    found.add(call)
    # Of JSON and TOML, of this project, of Pillow, and of an export that the same process has just written.
    own = {"Run.load", "self.checkpoints.load", "donated.load", "decode.load", "learner.load", "self.load"}
    own |= {"loop.checkpoints.load", "reader.load"}  # of files of weights, which knows three names
    assert found == own | {"json.loads", "tomllib.loads", "image.load", "tf.saved_model.load"}
