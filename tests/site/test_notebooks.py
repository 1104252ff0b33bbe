"""Every notebook runs, at the smallest size, and what the site shows of them is of the notebooks as they stand."""

from __future__ import annotations

import argparse
import ast
import base64
import importlib.util
import io
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import need

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COPIES = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
PICTURES = {"01_quickstart_digits": 7, "02_mnist": 8, "03_fashion_mnist": 7, "04_cifar10": 6,
            "05_prune_quantize_with_nni": 2, "06_four_methods": 7, "07_your_own_teacher": 4}  # fmt: skip


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNNER = load(ROOT / "notebooks" / "run.py")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def pictures(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.timeout(1500)  # alone, on a machine busy with other work; idle it takes two minutes
@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_runs(name: str, executed: tuple[Path, str]) -> None:
    from PIL import Image

    folder, said = executed
    copy = folder / f"{name}.ipynb"
    assert copy.exists(), said[-6000:]
    assert RUNNER.problem(copy) is None
    notebook = read(copy)
    about = notebook["metadata"]["zskd_nni"]
    assert about["scale"] == "smoke"
    assert about["versions"]["torch"]
    assert about["seconds"] > 0
    last = "".join(notebook["cells"][-1]["source"])
    assert last.startswith("## How this page was made") and about["device"] in last and "`smoke`" in last

    assert all(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert not [output for output in outputs(notebook) if output["output_type"] == "error"]
    # Progress and warnings have no place on a page.
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert len(pictures(notebook)) == PICTURES[name]
    for output in pictures(notebook):
        assert len(output["metadata"]["image/png"]["alt"]) > 15
        image = Image.open(io.BytesIO(base64.b64decode("".join(output["data"]["image/png"]))))
        assert image.width > 400 and len(image.convert("L").getcolors(256) or ()) > 10, "nothing was drawn"
    assert any("<table>" in "".join(output.get("data", {}).get("text/html", "")) for output in outputs(notebook))


def test_no_data_is_said_and_nothing_is_measured_on_it(executed: tuple[Path, str]) -> None:
    text = (executed[0] / "03_fashion_mnist.ipynb").read_text()
    assert "There is no fashion-mnist here" in text
    assert "procedural images" in text and "test data (fashion-mnist" not in text
    assert "no test data here" in (executed[0] / "05_prune_quantize_with_nni.ipynb").read_text()


@pytest.mark.real_data
def test_real_data_is_measured_on_where_it_is(executed: tuple[Path, str]) -> None:
    if not os.environ.get("ZSKD_NNI_DATA"):
        pytest.skip("ZSKD_NNI_DATA names no folder of real data")
    assert "measured on test data (mnist, 10000 images" in (executed[0] / "02_mnist.ipynb").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_sources_carry_no_outputs(path: Path) -> None:
    notebook = read(path)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not outputs(notebook)
    assert not [cell for cell in code if cell["execution_count"] is not None]
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    (parameters,) = (cell for cell in code if "parameters" in cell["metadata"].get("tags", ()))
    given: dict[str, Any] = {}
    exec("".join(parameters["source"]), given)
    assert given["scale"] == "smoke"
    assert given["out"] == f"out/notebooks/{path.stem}"
    assert {"seed", "device"} <= set(given)
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown" and first["source"][0].startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_says_what_is_learnt_folds_plumbing_and_has_three_exercises(path: Path) -> None:
    cells = read(path)["cells"]
    first = "".join(cells[0]["source"])
    assert "**What you will learn**" in first and "**Time and hardware:**" in first
    for cell in cells:
        tags = set(cell["metadata"].get("tags", ()))
        if cell["cell_type"] == "code" and tags & {"parameters", "hide-input", "answer"}:
            assert cell["metadata"]["jupyter"]["source_hidden"], cell["id"]
    shape = [(cell["cell_type"], "answer" in cell["metadata"].get("tags", ())) for cell in cells]
    titles = ["".join(cell["source"]).split("\n")[0] for cell in cells]
    for number in (1, 2, 3):
        question = titles.index(f"### Exercise {number}")
        assert titles[question + 1] == f"#### Answer {number}"
        assert shape[question : question + 3] == [("markdown", False), ("markdown", True), ("code", True)]
        assert cells[question + 1]["metadata"]["jp-MarkdownHeadingCollapsed"]
    assert "### Exercise 4" not in titles


def shown_beside(copy: Path) -> list[tuple[str, str]]:
    """The tables of an executed notebook that set a run beside a record: the record's name, and the table as text."""
    texts = ["".join(output.get("data", {}).get("text/plain", "")) for output in outputs(read(copy))]
    return [(found[1], text) for text in texts if (found := re.search(r"Record: results/([\w-]+)\.json", text))]


def test_what_stands_beside_a_record_is_that_record() -> None:
    seen = set()
    for copy in COPIES:
        about = read(copy)["metadata"]["zskd_nni"]
        for name, text in shown_beside(copy):
            seen.add(name)
            records = json.loads((ROOT / "results" / f"{name}.json").read_text())
            (record,) = (one for one in records if one["recipe"]["seed"] == about["seed"])
            assert f"seed {about['seed']}, commit {record['provenance']['commit'][:8]}" in text, copy
            (student,) = (line for line in text.splitlines() if line.startswith("student "))
            here, there = map(float, student.split()[1:3])
            assert there == pytest.approx(record["accuracy"]["student"], abs=0.006), copy
            if "The recipe is the same" in text:
                every = [one["accuracy"]["student"] for one in records]
                assert min(every) - 1 < here < max(every) + 1, f"{copy}: {here} for a recipe of {every}"
            made = record_date(name)
            assert made is None or about["executed"][:10] >= made, f"{copy} is older than results/{name}.json"
    assert {"digits-prune50", "mnist-half", "fashion-mnist-half", "cifar10-prune50-quick"} <= seen


def record_date(name: str) -> str | None:
    """The day on which a record was committed; None where there is no history to ask."""
    command = ["git", "log", "-1", "--format=%cs", "--", f"results/{name}.json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or None


@pytest.mark.parametrize("copy", COPIES, ids=NAMES)
def test_tables_of_records_are_those_of_the_files(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    notebook = read(copy)
    for cell in notebook["cells"]:
        if "records" not in cell["metadata"].get("tags", ()):
            continue
        known: dict[str, Any] = {"scale": notebook["metadata"]["zskd_nni"]["scale"]}
        tree = ast.parse("".join(cell["source"]))
        last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, str(copy), "exec"), known)
        table = eval(compile(last, str(copy), "eval"), known)
        (output,) = cell["outputs"]
        assert "".join(output["data"]["text/plain"]) == repr(table), "the records have changed since; --resume it"


def test_notebooks_are_there() -> None:
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06", "07"]


def test_the_site_shows_all_notebooks() -> None:
    assert [copy.stem for copy in COPIES] == NAMES


def test_what_the_site_shows_is_of_the_notebooks_as_they_stand() -> None:
    need("nbformat")
    for copy in COPIES:
        problem = RUNNER.problem(copy)
        assert problem is None, f"{copy}: {problem}"
        text = copy.read_text()
        assert read(copy)["metadata"]["zskd_nni"]["scale"] in ("cpu", "full"), copy
        assert not [output for output in outputs(read(copy)) if output.get("name") == "stderr"], copy
        assert str(Path.home()) not in text and "/tmp/" not in text, f"{copy}: a path of somebody's machine"


@pytest.fixture
def moved(executed: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A notebook of one's own to change, and its executed copy."""
    name = "01_quickstart_digits.ipynb"
    for folder, origin in (("notebooks", ROOT / "notebooks"), ("tutorials", executed[0])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes((origin / name).read_bytes())
    monkeypatch.setattr(RUNNER, "HERE", tmp_path / "notebooks")
    return tmp_path / "notebooks" / name, tmp_path / "tutorials" / name


def test_a_notebook_that_has_changed_since_is_noticed(moved: tuple[Path, Path]) -> None:
    source, copy = moved
    assert RUNNER.problem(copy) is None
    source.write_text(source.read_text().replace("seed = 0", "seed = 1"))
    assert "has changed since" in RUNNER.problem(copy)
    source.unlink()
    assert "any more" in RUNNER.problem(copy)


def test_changed_prose_goes_into_the_copy_and_changed_code_does_not(moved: tuple[Path, Path]) -> None:
    source, copy = moved
    before = outputs(read(copy))
    source.write_text(source.read_text().replace("You have a trained classifier", "You own a trained classifier"))
    assert RUNNER.problem(copy)
    RUNNER.refresh_prose(source, copy)
    assert RUNNER.problem(copy) is None
    assert "You own a trained classifier" in copy.read_text()
    assert outputs(read(copy)) == before
    assert read(copy)["cells"][-1]["metadata"]["tags"] == ["provenance"]
    source.write_text(source.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(SystemExit, match="must be executed again"):
        RUNNER.refresh_prose(source, copy)


def test_tables_of_records_are_read_again_with_the_prose(moved: tuple[Path, Path], monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    source, copy = moved
    before = copy.read_text()
    (record,) = json.loads((ROOT / "results" / "digits-prune50.json").read_text())[:1]
    teacher = f"{record['accuracy']['teacher']:.2f}"
    notebook = read(copy)
    (cell,) = (cell for cell in notebook["cells"] if "records" in cell["metadata"].get("tags", ()))
    cell["outputs"] = json.loads(json.dumps(cell["outputs"]).replace(teacher, "12.34"))
    copy.write_text(json.dumps(notebook))
    RUNNER.refresh_prose(source, copy)
    assert outputs(read(copy)) == outputs(json.loads(before))
    assert "tables of earlier results read again on 20" in "".join(read(copy)["cells"][-1]["source"])
    once = copy.read_text()
    RUNNER.refresh_prose(source, copy)
    assert copy.read_text() == once


@pytest.mark.slow
def test_a_notebook_that_fails_leaves_the_copy_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need("papermill", "ipykernel")
    import nbformat

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source, copy = tmp_path / "99_fails.ipynb", tmp_path / "done" / "99_fails.ipynb"
    cell = nbformat.v4.new_code_cell("scale = 'smoke'\nraise ValueError('no good')", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python"}}), source)
    copy.parent.mkdir()
    copy.write_text("as it was")
    given = argparse.Namespace(
        scale="smoke", seed=0, device="cpu", to=copy.parent, work=tmp_path / "work", resume=False
    )
    assert RUNNER.one(source, given) == 1
    assert "no good" in capsys.readouterr().err
    assert copy.read_text() == "as it was"
    assert list(copy.parent.iterdir()) == [copy]


def test_links_of_notebooks_lead_to_pages_and_pictures_have_words(tmp_path: Path) -> None:
    hook = load(ROOT / "docs" / "_hooks" / "notebooks.py")
    shown = {"data": {"image/png": "AAAA"}, "metadata": {"image/png": {"alt": 'a "heat" map'}}}
    notebook = tmp_path / "01.ipynb"
    notebook.write_text(json.dumps({"cells": [{"outputs": [shown, {"data": {"image/png": "BBBB"}}]}, {}]}))

    class Page(SimpleNamespace):
        def url_relative_to(self, _other: Any) -> str:
            return self.url

    pages = {"methods/zskd.md": Page(url="../../methods/zskd/"), "tutorials/02.ipynb": Page(url="../02/")}
    page = SimpleNamespace(file=SimpleNamespace(src_uri="tutorials/01.ipynb", abs_src_path=str(notebook)))
    given = (
        '<a class="x" href="../methods/zskd.md#a">a</a> <a href="02.ipynb">b</a> <a href="https://x.org/y.md">c</a>'
        '<img src="data:image/png;base64,AAAA" width=3><img alt="None." src="data:image/png;base64,BBBB"/>'
        ' <a href="none.md">d</a>'
    )
    html = hook.on_page_content(given, page=page, files=SimpleNamespace(get_file_from_path=pages.get))
    assert 'href="../../methods/zskd/#a"' in html and 'href="../02/"' in html
    assert 'href="https://x.org/y.md"' in html and 'href="none.md"' in html
    assert """<img alt='a "heat" map' src="data:image/png;base64,AAAA" width="3"/>""" in html
    assert '<img alt="A picture" src="data:image/png;base64,BBBB"/>' in html
    other = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    assert hook.on_page_content(given, page=other, files=None) == given


def test_plumbing_and_answers_are_folded_on_the_page(tmp_path: Path) -> None:
    need("bs4")
    from bs4 import BeautifulSoup

    hook = load(ROOT / "docs" / "_hooks" / "notebooks.py")
    cells = {"a": "parameters", "b": "injected-parameters", "c": "", "d": "hide-input", "e": "answer", "f": "answer"}
    output = '<div class="jp-Cell-outputWrapper">seen</div>'
    html = '<h1>It</h1><div class="jp-Notebook">' + "".join(
        f'<div class="jp-Cell"><div class="jp-Cell" id="cell-id={name}"><div class="jp-Cell-inputWrapper">code {name}'
        f"</div>{output if name in 'cdf' else ''}</div></div>"
        for name in cells
    )
    page = BeautifulSoup(hook.folded(html + "</div>", {name: {tag} for name, tag in cells.items()}), "html.parser")
    folds = {fold.summary.text + " " + re.sub(r"\W+", " ", fold.text): fold for fold in page.select("details")}
    assert [(fold.summary.text, re.findall("code (.)", fold.text)) for fold in folds.values()] == [
        ("Parameters and preparation", ["a", "b"]), ("Code", ["d"]), ("Answer", ["e", "f"])
    ]  # fmt: skip
    assert [bool(fold.select(".jp-Cell-outputWrapper")) for fold in folds.values()] == [False, False, True]

    about = SimpleNamespace(file=SimpleNamespace(src_uri="tutorials/01.ipynb"))
    assert hook.sources(about, None).count("<a ") == 1 and "<code>notebooks/01.ipynb</code>" in hook.sources(
        about, None
    )
    there = hook.sources(about, SimpleNamespace(repo_url="https://x.org/y/"))
    assert 'href="https://x.org/y/blob/main/notebooks/01.ipynb"' in there


def test_names_are_understood_by_their_beginnings() -> None:
    assert [path.stem for path in RUNNER.chosen(["02", "05_prune"])] == ["02_mnist", "05_prune_quantize_with_nni"]
    assert RUNNER.chosen([]) == NOTEBOOKS
    with pytest.raises(SystemExit, match="There is no notebook '08'"):
        RUNNER.chosen(["08"])
