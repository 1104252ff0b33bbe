"""What the tutorials show: pictures, tables, figures of networks side by side, figures from result files."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from helpers import small_network, small_teacher
from PIL import Image

from zskd_nni.compression.pruning.speedup import LayerWidths
from zskd_nni.data.datasets import LabelledImages
from zskd_nni.research.display import Picture, Table
from zskd_nni.research.explorer.one_impression import Question, explore_class, explore_one
from zskd_nni.research.reproduction.cells import resolve
from zskd_nni.research.reproduction.tables import TABLES
from zskd_nni.research.tutorial import figures, measuring
from zskd_nni.research.tutorial import records as results
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.checkpoint import History
from zskd_nni.training.metrics import TransitionResult, accuracy, agreement, confusion

NAMES = ["ant", "bee", "cat", "dog", "eel"]
RESULTS = Path(__file__).resolve().parent.parent / "results"


def drawn() -> dict[str, Picture]:
    teacher = small_teacher()
    asked = Question(label=2, steps=6)
    made = explore_class(teacher, asked, 4)
    answers = [explore_one(teacher, dataclasses.replace(asked, seed=seed), glimpses=4) for seed in range(2)]
    curve = torch.linspace(0, 1, 5)
    transition = TransitionResult(0.25, 3, 5, 1.0, curve, curve**2)
    points = {"real": torch.rand(9, 2), "made": torch.rand(7, 2)}
    layer = LayerWidths("conv", "Conv2d", 1, 1, 6, 3)
    return {
        "similarity": figures.similarity_picture(answers[0].similarity, NAMES),
        "confusion": figures.confusion_picture(torch.tensor([[5, 2], [0, 9]]), ["yes", "no"], "mistakes of a student"),
        "targets": figures.targets_picture({"wide": made.targets, "narrow": made.targets[:2]}, 2, NAMES),
        "gallery": figures.gallery_picture(made.images, made.logits, teacher.spec, NAMES, title="Four"),
        "opinions": figures.opinions_picture(made, teacher.spec, 4.0),
        "evolution": figures.evolution_picture(answers, teacher.spec),
        "curves": figures.curves_picture({"one": History([50, 100], [1.0, 0.1]), "other": History([50], [0.3])}),
        "bars": figures.bars_picture({"teacher": 99.0, "student": 90.5, "unmeasured": None}, "Accuracy"),
        "transitions": figures.transitions_picture(
            {"a": transition, "b": transition, "c": transition, "d": transition}
        ),
        "embedding": figures.embedding_picture(
            points, {"real": torch.arange(9) % 5, "made": torch.arange(7) % 5}, behind="real"
        ),
        "widths": figures.widths_picture([layer, dataclasses.asdict(layer)], "before and after"),
    }


def test_every_picture_is_drawn_and_described(tmp_path: Path) -> None:
    pictures = drawn()
    assert {f"{name}_picture" for name in pictures} == {
        name for name, it in vars(figures).items() if name.endswith("_picture") and it.__module__ == figures.__name__
    }
    for name, picture in pictures.items():
        image = Image.open(io.BytesIO(picture.png)).convert("L")
        assert image.width > picture.width > 200, name
        assert len(image.getcolors(256) or ()) > 10, name
        data, about = picture._repr_mimebundle_()
        assert base64.b64decode(data["image/png"]) == picture.png
        assert about["image/png"] == {"width": picture.width, "alt": picture.alt}
        assert len(picture.alt) > 15
        picture.save(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes() == picture.png
    with pytest.raises(UserError, match=r"\.png"):
        picture.save(tmp_path / "it.jpg")
    assert "conv 6 to 3" in pictures["widths"].alt
    assert "yes is most often taken for no" in pictures["confusion"].alt
    assert "90.50" in pictures["bars"].alt and "unmeasured" not in pictures["bars"].alt


def test_every_text_of_a_picture_has_at_least_nine_pixels_and_every_axis_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    kept, save = [], Figure.savefig

    def saved(figure: Figure, *arguments: object, **options: object) -> None:
        kept.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    for (name, picture), figure in zip(drawn().items(), kept, strict=True):
        per_point = picture.width / figure.get_figwidth() / 72
        texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
        small = {text.get_text(): text.get_fontsize() for text in texts if text.get_fontsize() * per_point < 9}
        assert not small, (name, small)
        titles = [figure.get_suptitle(), *(axis.get_title() for axis in figure.axes)]
        assert any(titles), f"{name} has no title"
        if name in ("gallery", "evolution"):  # pictures of images: labels of rows in the place of axes
            continue
        of_axes = [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes]
        assert figure.get_supxlabel() or any(x for x, _ in of_axes), f"{name}: what runs along x?"
        if name not in ("bars", "widths", "opinions"):  # names of the bars at y; the third says it in its x
            assert figure.get_supylabel() or any(y for _, y in of_axes), f"{name}: what runs along y?"


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(UserError, match="2 names were given for 5 classes"):
        figures.similarity_picture(torch.eye(5), ["a", "b"])
    with pytest.raises(UserError, match="none of the figures was measured"):
        figures.bars_picture({"student": None}, "Accuracy")


def test_a_table_reads_as_text_and_as_html() -> None:
    table = Table(("network", "accuracy"), [("a < b", "97.10 ± 0.20 %")], "of one seed")
    assert repr(table).splitlines() == [
        "network  accuracy", "-------  --------------", "a < b    97.10 ± 0.20 %", "of one seed"
    ]  # fmt: skip
    html = table._repr_html_()
    assert "<th>network</th>" in html and "<td>a &lt; b</td>" in html and "of one seed" in html
    assert "97.10&nbsp;±&nbsp;0.20&nbsp;%" in html
    with pytest.raises(ValueError, match="1 entries under 2 columns"):
        Table(("a", "b"), [("x",)])


def test_features_are_what_the_classifier_reads() -> None:
    teacher = small_teacher()
    images = torch.rand(12, *teacher.spec.shape)
    found = measuring.features(teacher, images, batch=5)
    logits = found @ teacher.class_weights().T + teacher.classifier.bias
    assert torch.allclose(logits, teacher.predict(images), atol=1e-5)


def test_an_embedding_keeps_alike_images_together_and_is_repeatable() -> None:
    teacher = small_teacher()
    torch.manual_seed(0)
    dark, bright = torch.rand(20, *teacher.spec.shape) * 0.02, 1 - torch.rand(20, *teacher.spec.shape) * 0.02
    points = measuring.embed(teacher, {"dark": dark, "bright": bright}, seed=1)
    assert points["dark"].shape == (20, 2)
    between = torch.cdist(points["dark"], points["bright"])
    assert (torch.cdist(points["dark"], points["dark"]).mean() < between.mean()).item()
    again = measuring.embed(teacher, {"dark": dark, "bright": bright}, seed=1)
    assert torch.equal(points["bright"], again["bright"])
    with pytest.raises(UserError, match="at least 10 images"):
        measuring.embed(teacher, {"few": dark[:3]})


def test_networks_side_by_side() -> None:
    teacher = small_teacher()
    student = small_network(seed=3)
    student.train()
    torch.manual_seed(0)
    data = LabelledImages(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 5, "made up")
    held_out = torch.rand(30, 1, 8, 8)
    networks = {"teacher": teacher, "student": student, "function": lambda images: teacher(images)}
    found = measuring.measure(networks, teacher, data, held_out)
    pixels = data.pixels(slice(0, 40), teacher.spec)
    with torch.no_grad():
        logits = student.eval()(teacher.spec.normalise(pixels))
    assert found["student"].accuracy == accuracy(logits, data.labels)
    assert found["student"].agreement == agreement(logits, teacher.predict(pixels))
    assert found["teacher"].agreement == found["function"].agreement == found["function"].agreement_held_out == 1
    assert found["student"].parameters == sum(weight.numel() for weight in student.parameters())
    assert found["teacher"].parameters == found["student"].parameters
    assert found["function"].parameters is None
    table = measuring.measured_table(found, data)
    assert table.columns == ["network", "accuracy", "agreement", "agreement, held out", "parameters"]
    assert "40 test images of made up" in table.caption
    without = measuring.measure(networks, teacher, None, held_out)
    assert without["student"].accuracy is None
    assert without["student"].agreement_held_out == found["student"].agreement_held_out
    assert "no test data here" in measuring.measured_table(without, None).caption


def test_absent_data_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("ZSKD_NNI_DATA", raising=False)
    assert measuring.images_if_there("mnist") is None
    assert "There is no mnist here" in capsys.readouterr().out
    assert len(measuring.images_if_there("digits") or ()) == 360


def test_confusion_counts_every_image_once() -> None:
    logits = torch.eye(3)[[0, 1, 1, 2, 0]]
    labels = torch.tensor([0, 1, 2, 2, 1])
    assert confusion(logits, labels).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert 100 * confusion(logits, labels).diagonal().sum() / 5 == accuracy(logits, labels)


def test_figures_of_recipes_are_those_of_the_files() -> None:
    table = results.recipes_table(["mnist-prune50-int8", "never-run"], RESULTS)
    records = json.loads((RESULTS / "mnist-prune50-int8.json").read_text())
    mean = sum(record["accuracy"]["student_int8"] for record in records) / 3
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["student"].startswith(f"{mean:.2f} ± ") and row["student"].endswith("(int8)")
    assert row["teacher"] == f"{records[0]['accuracy']['teacher']:.2f}"
    assert row["on noise"].startswith(f"{sum(r['controls']['noise']['accuracy_int8'] for r in records) / 3:.2f}")
    (fewer,) = results.recipes_table(["cifar10-ptq-w4a8"], RESULTS).rows
    assert fewer[2].endswith("(W4A8)")
    assert "seeds 0, 1, 2" in table.caption and "mnist-prune50-int8.json" in table.caption
    assert table.rows[1] == ["never-run", *["-"] * 6] and "Not run yet: never-run" in table.caption


def test_a_run_stands_beside_the_record_of_its_seed() -> None:
    records = json.loads((RESULTS / "mnist-half.json").read_text())
    record = next(one for one in records if one["recipe"]["seed"] == 1)
    report = {**record, "accuracy": {**record["accuracy"], "student": record["accuracy"]["student"] - 1}}
    table = results.beside_record(report, "mnist-half", RESULTS)
    rows = {row[0]: row[1:] for row in table.rows}
    students = [one["accuracy"]["student"] for one in records]
    there = record["accuracy"]["student"]
    assert rows["student"] == (
        f"{there - 1:.2f}",
        f"{there:.2f}",
        "-1.00",
        f"{min(students):.2f} to {max(students):.2f}",
    )
    assert rows["control: distilled on noise"][2] == "+0.00"
    assert f"seed 1, commit {record['provenance']['commit'][:8]}" in table.caption
    assert "The recipe is the same" in table.caption
    shorter = {**record["recipe"], "distillation": {**record["recipe"]["distillation"], "steps": 7}}
    table = results.beside_record({**report, "recipe": shorter}, "mnist-half", RESULTS)
    assert "distillation.steps 7 in the place of 12000" in table.caption
    other = {**report, "recipe": {**record["recipe"], "seed": 99}}
    assert "There is no record of seed 99" in results.beside_record(other, "mnist-half", RESULTS).caption
    assert "There is no record" in results.beside_record(report, "never-run", RESULTS).caption


def test_students_stand_beside_the_records_of_their_cells() -> None:
    table = results.beside_reproduction({"digits-zskd-best": 98.0, "none-such": None}, "full", 0, RESULTS / "reproduce")
    record = json.loads((RESULTS / "reproduce" / "digits-zskd-best-seed0.json").read_text())
    student = record["accuracy"]["student"]
    assert table.rows[0][1:4] == ("98.00", f"{student:.2f}", f"{98 - student:+.2f}")
    assert table.rows[1] == ("none-such", "-", "-", "-", "-")
    assert record["provenance"]["commit"][:8] in table.caption


def test_losses_of_a_run_are_read_from_its_state(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    losses = {"steps": [50, 100], "losses": [2.0, 1.0]}
    for name, record in (("student", {"distillation": losses}), ("control-noise", {})):
        (tmp_path / "state" / f"{name}.json").write_text(json.dumps({"record": record}))
    assert results.histories_of(tmp_path) == {"student": History([50, 100], [2.0, 1.0])}


def test_a_file_of_something_else_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text('[{"accuracy": 1}]')
    with pytest.raises(UserError, match="holds no runs of a recipe"):
        results.recipes_table(["it"], tmp_path)


def test_figures_of_tables_are_those_of_the_records(tmp_path: Path) -> None:
    assert "yet" in results.reproduction_table("mnist", tmp_path).caption
    cells = {cell.name: cell for table in TABLES.values() for cell in table.cells}

    def settings_of(name: str, scale: str) -> dict[str, object]:
        plan = resolve(cells[name], scale)
        networks = {"student": list(plan.network)}
        return {"ingredients": plan.ingredients, "networks": networks, "impressions": plan.size}

    for seed, student in ((0, 98.0), (1, 99.0)):
        record = {
            "format": "zskd_nni reproduction 1", "cell": "mnist-zskd-best", "pair": "mnist", "method": "zskd",
            "preset": "best", "variant": None, "seed": seed, "scale": "full",
            "accuracy": {"teacher": 99.3, "student": student}, "agreement": 0.98, "calibration_error": {}, "mte": None,
            "seconds": {}, "device": "cpu", "selected_on": "", "provenance": {"teacher": "one"},
            **settings_of("mnist-zskd-best", "full"),
        }  # fmt: skip
        (tmp_path / f"mnist-zskd-best-seed{seed}.json").write_text(json.dumps(record))
    table = results.reproduction_table("mnist", tmp_path)
    (row,) = table.rows
    assert list(row) == ["zskd best", "full", "24,000", "98.50 ± 0.71", "98.00 ± 0.00", "-", "0, 1"]
    for name, scale in (("mnist-zskd-best", "cpu"), ("mnist-zskd-paper-1-percent", "full"), ("mnist-sts-best", "cpu")):
        _, method, preset, *variant = name.split("-", 3)
        kind = {"method": method, "preset": preset, "variant": "".join(variant) or None}
        other = {**record, "cell": name, "scale": scale, **kind, **settings_of(name, scale)}
        (tmp_path / f"{name}-{scale}-seed1.json").write_text(json.dumps(other))
    older = {**record, "seed": 2, "accuracy": {"teacher": 99.3, "student": 50.0}, "impressions": 12000}
    (tmp_path / "older.json").write_text(json.dumps(older))
    table = results.reproduction_table("mnist", tmp_path)
    assert table.rows[0][3] == "98.50 ± 0.71" and "mnist-zskd-best (full) seed 2" in table.caption
    shown = [row[:2] for row in results.reproduction_table("mnist", tmp_path).rows]
    assert shown == [["zskd best", "full"], ["sts best", "cpu"]], "no smaller size beside the full one, no ablation"
    assert "reproduce digits" in results.reproduction_table("digits", tmp_path).caption
    assert results.reproduction_table("digits", tmp_path).rows[0][0] == "none yet"


def test_the_repository_is_found_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="lies in no copy"):
        results.repository()
    for name in ("notebooks", "results"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert results.repository() == tmp_path
