"""Published data sets are read as their files are written, too, over a stand-in of the hub on loopback."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.moa_search.data.hub_by_hand import NAME, Hub

ANSWERS = ["00123", "1.10", "1e5", "true", "NA", "None", "2024-01-31"]

READ = """
import json, sys
from moa_search.data.finding import find
from moa_search.errors import MoAError
from moa_search.tasks import parse_source
for source in sys.argv[1:]:
    try:
        cells = [list(rows.column("answer"))[start:stop] for rows, start, stop in find(parse_source(source)).parts]
        print(json.dumps([cell for some in cells for cell in some]))
    except MoAError as error:
        print(json.dumps(str(error)))
"""


def read(hub, folder, *sources):
    """What a process of its own reads: transformers' and datasets' settings are fixed when they are imported."""
    root = Path(__file__).parents[3]
    settings = {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "MOA_SEARCH_CACHE": str(folder / "moa"),
    }
    run = subprocess.run(
        [sys.executable, "-c", READ, *sources],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not run.returncode, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def rows(kind, answers):
    table = [{"context": f"c{n}", "question": "q", "answer": answer} for n, answer in enumerate(answers)]
    if kind == "jsonl":
        return "\n".join(map(json.dumps, table)).encode()
    if kind == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(table), file)
        return file.getvalue()
    text = "context,question,answer\n" + "".join(f"{row['context']},q,{row['answer']}\n" for row in table)
    return gzip.compress(text.encode()) if kind == "csv.gz" else text.encode()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "parquet"])
def test_cells_are_their_text_and_a_new_commit_is_read_anew(tmp_path, kind):
    hub = Hub({f"data/train-0.{kind}": rows(kind, ANSWERS), f"data/test-0.{kind}": rows(kind, ["held out"])})
    everything, first, test, unknown, missing = read(
        hub, tmp_path, NAME, f"{NAME}?split=train[:2]", f"{NAME}?split=test", f"{NAME}?split=tset", "org/nothing"
    )
    assert everything == ANSWERS
    assert first == ANSWERS[:2]
    assert test == ["held out"]
    assert 'Unknown split "tset"' in unknown
    assert missing.startswith("source 'org/nothing' can't be read: ")
    hub.files[f"data/train-0.{kind}"] = rows(kind, ANSWERS[::-1])
    assert read(hub, tmp_path, NAME) == [ANSWERS[::-1]]
    hub.shutdown()
    hub.server_close()
