"""The lines of fastirt/retrieval/README.md that load a Parquet file into other databases."""

import json
import re
from unittest.mock import MagicMock

import numpy as np
import pytest

from tests.gallery.made_up import COUNT, DIM, made_up, paths, unit
from tests.helpers import ROOT

pytest.importorskip("pyarrow")
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "fastirt/retrieval/README.md").read_text(), re.DOTALL)


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Runs the block of the README that imports a module, in a folder with vectors.parquet."""
    made_up(tmp_path / "shop").export_parquet(tmp_path / "vectors.parquet")
    monkeypatch.chdir(tmp_path)

    def run(module: str, stand_in: bool = True) -> MagicMock:
        client = MagicMock()
        if stand_in:
            monkeypatch.setitem(__import__("sys").modules, module, client)
        (block,) = [block for block in BLOCKS if module in block and "vectors.parquet" in block]
        exec(block, {})
        return client

    return run


def check(vectors: list, metadata: list[dict]) -> None:
    assert np.array_equal(np.array(vectors, np.float32), unit(COUNT))
    assert metadata[9] == {"brand": "b2", "price": 9, "note": ""}


def test_qdrant(lines):
    client = lines("qdrant_client")
    assert client.models.VectorParams.call_args.kwargs["size"] == DIM
    points = [call.kwargs for call in client.models.PointStruct.call_args_list]
    assert [point["id"] for point in points] == list(range(COUNT))
    assert [point["payload"].pop("path") for point in points] == paths(COUNT)
    check([point["vector"] for point in points], [point["payload"] for point in points])
    assert client.QdrantClient().upsert.called


def test_milvus(lines):
    client = lines("pymilvus").MilvusClient()
    assert client.create_collection.call_args.kwargs["dimension"] == DIM
    rows = [row for call in client.insert.call_args_list for row in call.args[1]]
    assert [row.pop("path") for row in rows] == paths(COUNT)
    check([row.pop("vector") for row in rows], rows)


def test_pgvector(lines):
    db = lines("psycopg").connect().__enter__()
    assert f"vector({DIM})" in db.execute.call_args_list[1].args[0]
    rows = [call.args[0] for call in db.cursor().copy().__enter__().write_row.call_args_list]
    assert [row[0] for row in rows] == paths(COUNT)
    check([json.loads(row[1]) for row in rows], [json.loads(row[2]) for row in rows])


def test_lancedb(lines, tmp_path):
    lancedb = pytest.importorskip("lancedb")
    lines("lancedb", stand_in=False)
    table = lancedb.connect(tmp_path / "database").open_table("shop")
    found = table.search(unit(COUNT)[7]).limit(1).to_list()[0]
    assert found["path"] == "a/7.jpg" and found["price"] == 7


def test_the_python_lines(tmp_path, monkeypatch, finished_run, image_folder):
    """Those of the section "From Python", on a small run."""
    (block,) = [block for block in BLOCKS if "Gallery.build" in block]
    monkeypatch.chdir(tmp_path)
    rows = [f"{image_folder}/test/class0{i // 4}/{i % 4}.jpg,{i % 3},{i * 5}" for i in range(12)]
    (tmp_path / "catalog.csv").write_text("\n".join(["path,shelf,price", *rows]))
    (tmp_path / "new_images").symlink_to(image_folder / "test/class05")
    (tmp_path / "photo.jpg").symlink_to(image_folder / "test/class00/0.jpg")
    block = block.replace("outputs/quickstart/irt-r", str(finished_run))
    block = block.replace("product00153/0002.jpg", f"{image_folder}/test/class01/0.jpg")
    names = {"vectors": unit(2, dim=48)}
    exec(block, names)
    assert len(names["gallery"]) == 15 and len(names["found"].paths) == 3
    assert all(float(row["price"]) < 30 for row in names["found"].metadata)
    assert (tmp_path / "vectors.parquet").is_file()
