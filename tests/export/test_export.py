"""`fastirt export`: the exported files give the run's own vectors, or there are no files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastirt
from fastirt.config.options import InputConfig
from fastirt.errors import UserError
from fastirt.export import export, push, timm_folder
from fastirt.export.onnx_graphs import files as onnx_files
from fastirt.images.decoders import torchvision
from fastirt.images.resize_crop import crop_offset, resized_size
from tests.helpers import folder_flags, last_line, run_cli, train_tiny, write_splits

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES = ((24, 24), (40, 31), (9, 60), (17, 5), (18, 18), (300, 200))
ALL = ("model", "encoder", "model_fp16", "encoder_fp16", "model_int8", "encoder_int8")


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory) -> Path:
    """`finished_run` in all forms."""
    out = tmp_path_factory.mktemp("exported") / "out"
    assert run_cli("export", finished_run, out, *"--onnx --timm --fp16 --int8 --licence apache-2.0".split()) == 0
    return out


@pytest.fixture(scope="module")
def model(finished_run):
    """In fp32 with the decoder whose pixels the graph has."""
    return fastirt.load(finished_run, options={"precision": "fp32", "loader": "torchvision"})


@pytest.fixture
def graph_is_made(exported, monkeypatch):
    """torch's export takes seconds: the graph of `exported` is taken instead."""
    monkeypatch.setattr(onnx_files, "encoder_graph", lambda encoder: onnx.load(exported / "encoder.onnx"))


def run_file(file: Path, **inputs: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(str(file)).run(None, inputs)[0]


def pixels(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def code_of(card: str, module: str) -> str:
    """The block of Python in a card that imports `module`."""
    return next(block for block in re.findall(r"```python\n(.*?)```", card, re.S) if module in block)


@pytest.mark.parametrize("height, width", SIZES)
def test_images_of_any_size_give_the_vectors_of_encode(exported, model, height, width):
    images = pixels(3, height, width)
    found = run_file(exported / "model.onnx", images=images)
    expected = model.encode(list(images))
    assert found.shape == expected.shape and found.dtype == np.float32
    assert (found * expected).sum(1).min() >= 0.99999


def test_pixels_give_the_vectors_of_encode(exported, model, image_folder):
    files = sorted((image_folder / "test").rglob("*.jpg"))[:5]
    batch = torch.stack([model.transform(Image.open(file)) for file in files]).numpy()
    for count in (1, 5):
        found = run_file(exported / "encoder.onnx", pixels=batch[:count])
        assert (found * model.encode(files[:count])).sum(1).min() >= 0.99999


@pytest.mark.parametrize("resize", ["square", "shorter"])
@pytest.mark.parametrize("size, resized", [(16, 18), (24, 24), (20, 33)])
def test_the_graph_resizes_as_torch_does(resize, size, resized):
    from fastirt.export.onnx_graphs.preprocess import preprocessing_model

    graph = preprocessing_model(
        InputConfig(input_size=size, resize=resize, resize_size=resized), (0,) * 3, (1 / 255,) * 3, 20, 10
    )
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for height, width in SIZES:
        image = pixels(1, height, width)
        target = resized_size(height, width, resize, resized)
        top, left = (crop_offset(side, size, None) for side in target)
        expected = torchvision.resize(image[0], target, target)[top : top + size, left : left + size]
        difference = np.abs(session.run(None, {"images": image})[0][0].transpose(1, 2, 0) - expected)
        assert difference.max() <= 1.001 and difference.mean() < 0.01, (height, width)


def test_the_files_are_valid_and_tell_nothing_of_this_machine(exported):
    for name in ALL:
        onnx.checker.check_model(str(exported / f"{name}.onnx"))
        domains = [entry.domain for entry in onnx.load(exported / f"{name}.onnx").opset_import]
        assert domains.count("") == 1 and len(domains) == len(set(domains))  # else no tool quantizes it
    for file in exported.iterdir():
        assert str(Path(fastirt.__file__).parent).encode() not in file.read_bytes(), file


def test_the_card_and_the_report_hold_the_proof(exported, image_folder):
    report = json.loads((exported / "export.json").read_text())
    card = (exported / "README.md").read_text()
    files = report["files"]
    assert list(files) == [f"{name}.onnx" for name in ALL]
    files_of_test = sorted((image_folder / "test").rglob("*.jpg"))
    vectors = np.concatenate(
        [run_file(exported / "model.onnx", images=np.asarray(Image.open(file))[None]) for file in files_of_test]
    )
    nearest = (vectors @ vectors.T - 2 * np.eye(len(vectors))).argmax(1)
    hits = [files_of_test[i].parent == file.parent for i, file in zip(nearest, files_of_test)]
    assert files["model.onnx"]["recall"] == pytest.approx(100 * np.mean(hits)) == pytest.approx(report["recall"])
    assert files["model.onnx"]["difference"] == 0 and files["model.onnx"]["worst_cosine"] >= 0.99999
    assert files["model_fp16.onnx"]["worst_cosine"] > 0.999 and files["model_int8.onnx"]["mean_cosine"] > 0.9
    assert set(report["latency"]) == {"torch", "encoder.onnx", "encoder_fp16.onnx", "encoder_int8.onnx"}
    for text in (
        'license: "apache-2.0"',
        "batch 32",
        "24 |",
        f"{report['recall']:.2f} %",
        "95 %",
        "int8.onnx",
        f"ONNX {report['format']}.",
    ):
        assert text in card, text


def test_the_lines_of_the_card_run(exported, model, image_folder):
    card = (exported / "README.md").read_text()
    file = sorted((image_folder / "test").rglob("*.jpg"))[3]
    expected = torch.from_numpy(model.encode(file))
    for module in ("timm", "onnxruntime"):
        code = code_of(card, module)
        assert code.count("\n") <= 5
        names: dict = {}
        exec(code.replace("image.jpg", str(file)), names)
        z = torch.as_tensor(names["z"]).detach()
        assert z.shape == expected.shape and float((z * expected).sum()) > 0.9999, module


def test_a_file_that_differs_is_not_exported(graph_is_made, finished_run, tmp_path, monkeypatch):
    recall = onnx_files.proof.recall_at_1
    measured = 100 * json.loads((finished_run / "metrics.json").read_text())["recall@1"]
    monkeypatch.setattr(onnx_files.proof, "recall_at_1", lambda *_: measured - 20)
    with pytest.raises(UserError, match=rf"metrics\.json {measured:.2f} %, of its weights {measured - 20:.2f} %"):
        export(finished_run, tmp_path / "out", onnx=True)
    monkeypatch.setattr(onnx_files, "_check_metrics", lambda *_: None)
    values = iter([50.0, 49.8])
    monkeypatch.setattr(onnx_files.proof, "recall_at_1", lambda *_: next(values))
    with pytest.raises(UserError, match=r"49\.80 %.* 50\.00 %.*0\.20 points.*--max-difference 0\.1"):
        export(finished_run, tmp_path / "out", onnx=True)
    monkeypatch.setattr(onnx_files.proof, "recall_at_1", recall)
    monkeypatch.setattr(
        "fastirt.export.onnx_graphs.encoder.normalization_constants", lambda *_: ((0.1,) * 3, (0.9,) * 3)
    )
    with pytest.raises(UserError, match=r"model\.onnx: .*\d\.jpg: cosine 0\.\d+"):
        export(finished_run, tmp_path / "out", onnx=True, max_difference=100)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def odd_run(tmp_path) -> Path:
    """A model off the shelf with pooling gem, on packed images of odd sizes and kinds."""
    data = write_splits(tmp_path / "data", (2, 4), (3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, folder in enumerate(sorted((data / "test").iterdir())):
        Image.fromarray(pixels(1, 30 + number, 44)[0]).save(folder / "turned.jpg", exif=exif)
        Image.fromarray(pixels(1, 20, 50 + number)[0]).save(folder / "pillow.gif")
    flags = ["--method", "irt-o", "--resize", "shorter", "--pooling", "gem", "--loader", "torchvision"]
    assert train_tiny(data, tmp_path / "run", *flags, "--orientation", "exif", "--max-iter", 0, "--rank", 1) == 0
    return tmp_path / "run"


@pytest.mark.slow
def test_odd_images_and_pooling(graph_is_made, odd_run, tmp_path, monkeypatch, caplog):
    from fastirt.export.onnx_graphs.encoder import encoder_graph

    monkeypatch.setattr(onnx_files, "encoder_graph", encoder_graph)
    monkeypatch.setattr(onnx_files.proof, "LARGE_BYTES", 6000)  # some batches give their memory back
    report = export(odd_run, tmp_path / "out")
    assert "model.forward_features(x)" in (tmp_path / "out/README.md").read_text()
    assert "does not pool as this run does" in caplog.text
    assert "3 images that the run reads through Pillow" in report["note"]
    assert report["files"]["model.onnx"]["worst_cosine"] >= 0.99999
    assert run_cli("pack", tmp_path / "store", *folder_flags(tmp_path / "data"), "--resize", "shorter",
                   "--resize-size", 18, "--input-size", 16) == 0  # fmt: skip
    packed = export(odd_run, tmp_path / "packed", timm=True, packed=tmp_path / "store")
    assert packed["timm"]["images"] == 18 and packed["files"] == {}


def test_what_timm_cannot_express_is_one_line(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(timm_folder, "timm_call", lambda encoder: None)
    with pytest.raises(UserError, match="--timm.*--pooling cls"):
        export(finished_run, tmp_path / "out", timm=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_only_if_it_is_an_export(trained_run, tmp_path, capsys):
    assert run_cli("export", trained_run, trained_run, "--timm") == 2
    assert "exists" in (line := last_line(capsys)) and "--overwrite" in line
    assert run_cli("export", trained_run, trained_run, "--timm", "--overwrite") == 2
    assert "not an export" in last_line(capsys) and (trained_run / "metrics.json").exists()
    out = tmp_path / "out"
    assert run_cli("export", trained_run, out, "--timm") == 0
    assert f"wrote {out}" in capsys.readouterr().out
    (out / "stray").touch()
    assert run_cli("export", trained_run, out, "--timm", "--overwrite") == 0
    assert not (out / "stray").exists() and (out / "model.safetensors").exists()


def test_images_that_moved_are_named(trained_run, image_folder, tmp_path, capsys):
    moved = tmp_path / "moved"
    config = trained_run / "config.json"
    config.write_text(config.read_text().replace(str(image_folder), str(moved)))
    assert run_cli("export", trained_run, tmp_path / "out", "--timm") == 2
    assert str(moved) in (line := last_line(capsys)) and "--data-path" in line
    assert run_cli("export", trained_run, tmp_path / "out", "--timm", "--data-path", image_folder) == 0
    assert "| recall@1" in (tmp_path / "out/README.md").read_text()
    others = write_splits(tmp_path / "others", (2, 4), (3, 4))
    assert run_cli("export", trained_run, tmp_path / "y", "--timm", "--data-path", others) == 0
    card = (tmp_path / "y/README.md").read_text()
    assert "| recall@1" not in card and "The run itself is of folder, of other images" in card
    assert run_cli("export", trained_run / "model.safetensors", tmp_path / "x", "--timm") == 2
    assert "--data-path" in last_line(capsys)


def test_a_missing_package_is_named(finished_run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'fastirt\[export\]'"):
        export(finished_run, tmp_path / "out", onnx=True)


def test_push(finished_run, tmp_path, monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    calls = []

    def upload(self, *, repo_id, folder_path, **_):
        calls.append((repo_id, sorted(file.name for file in Path(folder_path).iterdir())))
        if len(calls) == 1:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, exist_ok: calls.append((name, "made")))
    report = export(finished_run, tmp_path / "out", timm=True, push="shop/irt")
    files = ["README.md", "config.json", "export.json", "model.safetensors"]
    assert calls == [("shop/irt", files), ("shop/irt", "made"), ("shop/irt", files)]
    assert report["url"] == "https://huggingface.co/shop/irt"
    assert 'create_model("hf-hub:shop/irt"' in (tmp_path / "out/README.md").read_text()


def test_push_without_a_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="--push shop/irt: not uploaded .*is complete"):
        push.upload(tmp_path, "shop/irt")
    for name in ("irt", "a/b/c", "shop/ irt", "../x/y"):
        with pytest.raises(UserError, match="USER/NAME"):
            push.check_name(name)
