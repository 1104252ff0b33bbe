"""The command line. A user's mistake ends in one sentence and exit code 2; a stopped run in 130 or 143."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from zskd_nni.runtime.errors import UserError

app = typer.Typer(
    name="zskd-nni",
    help="Compress a trained network without its training data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="A recipe is a packaged name (zskd-nni recipes) or a YAML file. The same command again resumes.",
)

RecipeArgument = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A packaged recipe, or a YAML file.")]
OutOption = Annotated[Path, typer.Option("--out", help="Output folder; the same command again resumes in it.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Instead of the recipe's seed.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a key of the recipe; may be given often."),
]
ScaleOption = Annotated[
    str | None,
    typer.Option("--scale", metavar="NAME", help="One of the recipe's scales, such as cpu; full where absent."),
]
DataRootOption = Annotated[
    Path | None,
    typer.Option("--data-root", help="Folder of real test data; the variable ZSKD_NNI_DATA where absent."),
]
DownloadOption = Annotated[bool, typer.Option("--download", help="Let torchvision fetch test data that is missing.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, or cuda:N.")]
_MOST_THREADS = 4096  # as a store of impressions takes them
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=4096, help="CPU threads; all cores where absent.")
]
_DIVIDED = ("synthesize", "distill", "compress")  # what several processes can do together
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zskd-nni {importlib.metadata.version('zskd_nni')}")
        raise typer.Exit


@app.callback()
def _only_what_can_be_divided(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Tell the version and leave.")
    ] = False,
) -> None:
    from zskd_nni.runtime.torchrun import launched

    here = launched()
    if here is not None and here.size > 1 and context.invoked_subcommand not in _DIVIDED:
        raise UserError(
            f"{context.invoked_subcommand} is one process; of several, as torchrun starts them, can do "
            f"{', '.join(_DIVIDED[:-1])} and {_DIVIDED[-1]}."
        )


def _prepare(device: str, threads: int | None = None) -> None:
    import torch

    torch.set_flush_denormal(True)  # denormals slow a CPU by a factor of up to a hundred
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device is cpu, cuda or cuda:N, not {device!r}.") from error
    if kind.type not in ("cpu", "cuda"):
        raise UserError(f"--device is cpu, cuda or cuda:N, not {device!r}.")
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch finds no usable GPU.")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, counted from 0.")


def _run(
    recipe: str,
    out: Path,
    seed: int | None,
    changes: list[str] | None,
    scale: str | None,
    root: Path | None,
    download: bool,
    device: str,
    threads: int | None,
    quiet: bool,
    impressions: Path | None = None,
) -> None:
    from zskd_nni.pipeline import Run
    from zskd_nni.pipeline.report_html import render_table
    from zskd_nni.recipes.load import load_recipe
    from zskd_nni.runtime.distributed import joined

    loaded = load_recipe(recipe, changes or (), seed, scale)
    _prepare(device, threads)
    with joined(device) as own:
        run = Run(loaded, out, device=own, root=root, download=download, impressions=impressions, quiet=quiet)
        report = run.compress()
    if _leads():
        typer.echo(render_table(report))


def _leads() -> bool:
    """Whether this process speaks, of several that torchrun started."""
    from zskd_nni.runtime.torchrun import launched

    here = launched()
    return here is None or here.rank == 0


def _input_of(content: Any, path: Path) -> Any:
    from zskd_nni.models.input_spec import InputSpec
    from zskd_nni.runtime.validation import build_settings

    try:
        return build_settings(InputSpec, dict(content.get("input") or {}), "input")
    except (AttributeError, TypeError, ValueError) as error:  # what somebody wrote may be anything
        raise UserError(f"{path} does not describe the network's input: {error}.") from error


@app.command()
def demo(
    out: OutOption = Path("out/demo"),
    seed: SeedOption = None,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compress a digit classifier without data: everything at once, in about a minute."""
    compress("digits-prune50", out, seed, None, None, None, False, "cpu", threads, quiet)


@app.command()
def compress(
    recipe: RecipeArgument,
    out: OutOption,
    seed: SeedOption = None,
    changes: SetOption = None,
    scale: ScaleOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run a whole recipe: impressions, student, controls, export, report."""
    _run(recipe, out, seed, changes, scale, data_root, download, device, threads, quiet)
    if _leads():
        typer.echo(f"\nreport: {out / 'report.html'}   network: {out / 'student.onnx'}, {out / 'student.safetensors'}")


@app.command()
def synthesize(
    recipe: RecipeArgument,
    out: OutOption,
    size: Annotated[int | None, typer.Option("--size", min=1, help="Impressions, instead of the recipe's.")] = None,
    seed: SeedOption = None,
    changes: SetOption = None,
    scale: ScaleOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Make a store of data impressions of a recipe's teacher, or the transfer set of another method."""
    from zskd_nni.methods.registry import TransferRequest, find_method
    from zskd_nni.recipes.load import load_recipe
    from zskd_nni.runtime.distributed import joined, team

    loaded = load_recipe(recipe, [*(changes or ()), *([f"transfer.size={size}"] if size else [])], seed, scale)
    _prepare(device, threads)
    section = loaded.recipe.transfer
    request = TransferRequest(
        size=section.size,
        batch_size=loaded.recipe.distillation.batch,
        seed=loaded.recipe.seed,
        folder=out,
        options=section.options(),
        quiet=quiet,
        root=data_root,
        download=download,
        base=loaded.base,
    )
    with joined(device) as own_device:
        teacher = loaded.teacher().to(own_device)
        if _leads():
            typer.echo(f"teacher: {teacher.num_classes} classes, classifier {teacher.classifier_path}")
        if (out / "run.json").exists():
            raise UserError(f"{out} is the folder of a run of compress or distill; choose another --out.")
        source = find_method(section.method).source(teacher, request)
        if _leads():
            typer.echo(_what_was_made(section.method, source.size, out, team().size))


def _what_was_made(method: str, size: int | None, out: Path, processes: int) -> str:
    from zskd_nni.synthesis import ImpressionStore

    if method == "real":
        return f"{method} stores nothing: its {size:,} images are read while a student learns"
    if size is None:
        return f"{method} stores nothing: its images are made while a student learns"
    if not (out / "manifest.json").exists():  # no impressions: an arbitrary transfer set
        return f"{size:,} images of {method} in {out}"
    summary = ImpressionStore.open(out).summary()
    pace = summary["impressions_per_second"]
    return (
        f"{summary['impressions']:,} impressions in {out}: mean divergence {summary['mean_fit']:.4f} after "
        f"{summary['mean_steps']:.1f} steps"
        + ("" if pace is None else f", {pace:,.0f} a second")
        + (" and process" if pace is not None and processes > 1 else "")
    )


@app.command()
def distill(
    recipe: RecipeArgument,
    out: OutOption,
    impressions: Annotated[
        Path | None, typer.Option("--impressions", help="A store made by synthesize, instead of making one.")
    ] = None,
    seed: SeedOption = None,
    changes: SetOption = None,
    scale: ScaleOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Teach a recipe's student network on impressions: no controls, and NNI's compression is left out."""
    from zskd_nni.recipes.load import load_recipe

    loaded = load_recipe(recipe, changes or (), seed, scale)
    if loaded.recipe.student is None:
        raise UserError(f"The recipe {recipe} names no student network to teach; use zskd-nni compress for it.")
    plain = [*(changes or ()), "controls=[]", "compression={}"]
    _run(recipe, out, seed, plain, scale, data_root, download, device, threads, quiet, impressions)


@app.command()
def search(
    recipe: RecipeArgument,
    out: OutOption,
    seed: SeedOption = None,
    changes: SetOption = None,
    scale: ScaleOption = None,
    data_root: DataRootOption = None,
    device: DeviceOption = "cpu",
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, max=4096, help="CPU threads of a trial; the cores divided where absent."),
    ] = None,
    portal: Annotated[
        bool, typer.Option("--portal", help="Open NNI's web portal to the network; it has no password.")
    ] = False,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Of NNI's web server; a free one where absent.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Search a recipe's settings by an NNI experiment, without data; docs/experiments.md."""
    from zskd_nni.data.datasets import data_root as find_root
    from zskd_nni.pipeline.search.experiment import BEST, Search
    from zskd_nni.pipeline.search.trial_table import render_trials
    from zskd_nni.recipes.load import load_recipe

    loaded = load_recipe(recipe, changes or (), seed, scale)
    _prepare(device, threads)
    table = Search(
        loaded,
        out,
        device=device,
        threads=threads,
        root=find_root(data_root),
        portal=portal,
        port=port,
        quiet=quiet,
    ).run()
    typer.echo(render_trials(table))
    typer.echo(f"\nbest: trial {table['best']}; its recipe: zskd-nni compress {out / BEST}")


@app.command(hidden=True)
def trial(job: Annotated[Path, typer.Argument(metavar="FOLDER", help="As a search wrote it.")]) -> None:
    """One trial of a search; NNI starts it."""
    from zskd_nni.pipeline.search.trial import JOB, run_trial
    from zskd_nni.runtime.files import read_json

    settings = read_json(job / JOB)
    _prepare(settings["device"], settings["threads"])
    run_trial(job)


@app.command()
def evaluate(
    network: Annotated[Path, typer.Argument(metavar="FILE", help="A student.json (or the folder it lies in).")],
    data: Annotated[str, typer.Option("--data", help="digits, mnist, fashion-mnist, cifar10, an .npz or a folder.")],
    split: Annotated[str, typer.Option("--split", help="train or test.")] = "test",
    data_root: DataRootOption = None,
    download: DownloadOption = False,
) -> None:
    """Measure a saved network, and the ONNX files beside it, on labelled images."""
    from zskd_nni.data.datasets import load_images
    from zskd_nni.models.onnx_export import run_onnx
    from zskd_nni.models.serialization import load_network
    from zskd_nni.models.teacher import first_tensor
    from zskd_nni.runtime.files import read_json
    from zskd_nni.training.inference import logits_on
    from zskd_nni.training.metrics import accuracy, agreement

    _prepare("cpu")
    path = network / "student.json" if network.is_dir() else network
    model = load_network(path)
    spec = _input_of(read_json(path), path)
    images = load_images(data, split, data_root, download)
    logits = logits_on(lambda batch: first_tensor(model(spec.normalise(batch))), images, spec)
    images.require_labels(logits.shape[1])
    typer.echo(f"{path}: accuracy {accuracy(logits, images.labels):.2f} % on {len(images):,} images of {images.name}")
    for ending in (".onnx", "-int8.onnx"):
        exported = path.with_name(path.stem + ending)
        if not exported.exists():
            continue
        answered = logits_on(functools.partial(run_onnx, exported), images, spec)
        typer.echo(
            f"{exported}: accuracy {accuracy(answered, images.labels):.2f} %, "
            f"agreement {100 * agreement(answered, logits):.2f} %"
        )


@app.command()
def show(
    store: Annotated[Path, typer.Argument(metavar="FOLDER", help="A store of impressions.")],
    out: Annotated[Path, typer.Option("--out", help="The picture, .png.")] = Path("impressions.png"),
    count: Annotated[
        int, typer.Option("--count", min=1, max=1000, help="How many impressions at most, equally many of a class.")
    ] = 60,
) -> None:
    """Draw a store's impressions, labelled with what the teacher sees in each."""
    from zskd_nni.synthesis import ImpressionStore
    from zskd_nni.synthesis.image_grid import impressions_picture, some_of_each, spread

    if out.suffix != ".png":
        raise UserError(f"--out is a .png file, not {out}.")
    opened = ImpressionStore.open(store)
    made = [index for index in range(len(opened.plan)) if opened.damage(index) is None]
    if not made:
        raise UserError(f"{store} holds no finished impressions yet.")
    spec = _input_of(opened.manifest["identity"], store / "manifest.json")
    first = opened.read(made[0])
    shards = (first if index == 0 else opened.read(made[index]) for index in spread(len(made)))
    classes = first.logits.shape[1]
    images, logits = some_of_each(((one.images, one.logits) for one in shards), max(1, count // classes))
    impressions_picture(images[:count], logits[:count], spec, out, title=str(store))
    typer.echo(f"{out}: {len(images[:count])} of {len(opened):,} impressions")


@app.command("recipes")
def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe's YAML.")] = None,
) -> None:
    """List the packaged recipes, or print one."""
    import yaml

    from zskd_nni.recipes.load import packaged_names, recipe_text

    if name is not None:
        typer.echo(recipe_text(name)[0], nl=False)
        return
    width = max(len(entry) for entry in packaged_names())
    for entry in packaged_names():
        typer.echo(f"{entry:<{width}}  {yaml.safe_load(recipe_text(entry)[0])['description']}")


@app.command("train-teacher")
def train_teacher_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="lenet5-digits, lenet5-mnist, ...; see --help.")],
    out: OutOption,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of start and order.")] = 0,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Instead of the recipe's.")] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="Measure on a twelfth held back from the training split.")
    ] = False,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train one of the zoo's teachers on real data.

    NAME is lenet5-digits, lenet5-mnist, lenet5-fashion-mnist, alexnet-cifar10, resnet18-cifar10, wrn-40-2-cifar10,
    wrn-40-2-cifar100 or wrn-40-2-svhn. It is how the shipped teachers were made; beside the baselines of reproduce it
    is the one command that trains on real data. A training that was stopped goes on; one that is finished in OUT is not
    repeated.
    """
    from zskd_nni.models.zoo.trained import trained_names
    from zskd_nni.research.train_teacher import train_teacher

    _prepare(device, threads)
    if name in trained_names():
        typer.echo(
            f"{name} comes with the package: recipes take that one. To use this one, name its file as teacher.weights.",
            err=True,
        )
    result = train_teacher(
        name,
        out,
        root=data_root,
        download=download,
        seed=seed,
        epochs=epochs,
        device=device,
        validation=validation,
        quiet=quiet,
    )
    typer.echo(f"{out / name}.safetensors: {result['accuracy']:.2f} % on {result['measured_on']} of {result['data']}")


@app.command()
def reproduce(
    table: Annotated[str | None, typer.Argument(metavar="[TABLE]", help="A table; all for every cell.")] = None,
    cells: Annotated[
        list[str] | None, typer.Option("--cell", metavar="SUBSTRING", help="Only cells so called; may be given often.")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", min=0, help="Instead of the table's seeds; may be given often.")
    ] = None,
    scale: Annotated[str, typer.Option("--scale", metavar="NAME", help="full, cpu or smoke.")] = "full",
    out: Annotated[Path, typer.Option("--out", help="Transfer sets and students; a later run goes on there.")] = Path(
        "runs/reproduce"
    ),
    results: Annotated[Path, typer.Option("--results", help="Folder of the records.")] = Path("results/reproduce"),
    list_only: Annotated[
        bool, typer.Option("--list", help="Show tables, or a table's cells and where they are.")
    ] = False,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run the papers' tables: one record a run, in results/reproduce.

    A run that is finished is not run again, one that was stopped goes on. The same command in a second process takes
    the cells that the first is not at. Without a TABLE the tables are listed.
    """
    from zskd_nni.research.reproduction.run import Place
    from zskd_nni.research.reproduction.session import list_cells, list_tables, run_table

    if table is None:
        if cells:
            raise UserError("--cell needs a table; reproduce all --cell finds it in any.")
        typer.echo(list_tables())
        return
    _prepare(device, threads)
    place = Place(out, results, data_root, download, device, quiet)
    if list_only:
        typer.echo(list_cells(table, cells or [], seeds or [], scale, place))
        return
    run_table(table, cells or [], seeds or [], scale, place, typer.echo)


@app.command("results")
def results_command(
    results: Annotated[Path, typer.Option("--results", help="Folder of the records.")] = Path("results/reproduce"),
    out: Annotated[Path, typer.Option("--out", help="The page.")] = Path("docs/results.md"),
) -> None:
    """Write the page of results from the records of reproduce."""
    from zskd_nni.research.reproduction.page import render_page
    from zskd_nni.research.reproduction.pairs import PAIRS
    from zskd_nni.research.reproduction.records import read_records
    from zskd_nni.research.reproduction.run import teachers_here
    from zskd_nni.runtime.files import make_folder, write_atomic

    records = read_records(results)
    if not records:
        raise UserError(f"--results: there is no record in {results}; {out} is left as it is.")
    make_folder(out.parent)
    teachers = teachers_here({record["pair"] for record in records} & set(PAIRS))
    write_atomic(out, render_page(records, teachers))
    typer.echo(f"{out}: {len(records)} records")


def main() -> None:
    """Entry point of ``zskd-nni``."""
    # Threads that spin while they wait make a CPU that others use as well up to seven times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from zskd_nni.runtime.signals import Interrupted, stoppable

    try:
        with stoppable():
            try:
                app()  # answers wrong usage itself, with exit code 2
            except Interrupted as stop:
                for signum in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(signum, signal.SIG_IGN)
                print(f"{stop}; what was finished is kept, the same command goes on from there.", file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(128 + stop.signum)  # nothing is left to do, and another signal must not be answered otherwise
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a file of the user's that cannot be read, a name that no file can have
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"{where}{error.strerror or error}")
    except MemoryError:
        _fail(_TOO_LARGE)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        _fail(_TOO_LARGE)


_TOO_LARGE = (
    "There is not enough memory for this. Smaller batches (distillation.batch, transfer.synthesis.slots) or fewer "
    "images (transfer.size) need less; what was finished is kept"
)


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    # The CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _fail(sentence: str) -> None:
    sentence = " ".join(sentence.split())  # somebody else's exception may be in it, line breaks and all
    print(f"Error: {sentence}" + ("" if sentence.endswith((".", "?", "!")) else "."), file=sys.stderr)
    sys.exit(2)
