"""A whole measurement: exams are drawn, every side takes them in turn, and the report is made of it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import bilevel
from bilevel.bundle.format import Bundle, load_bundle
from bilevel.errors import BundleError, EngineError, MissingDependency, RequestError
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.backend.select import AUTO, open_session
from bilevel.runtime.backend.session import Session
from bilevel.runtime.bench.report import describe_machine
from bilevel.runtime.generate.text import BundleTokenizer, RenderedEncoder
from bilevel.runtime.quality.exams import LOSS, TASKS, Exam, load_wording
from bilevel.runtime.quality.filler import load_filler
from bilevel.runtime.quality.floors import AskedFloor, judge
from bilevel.runtime.quality.model import DENSE, MASS, ROUTED, WINDOW, Note, Plan, QualityReport, SideInfo
from bilevel.runtime.quality.reader import Reader, TokenScore
from bilevel.runtime.quality.results import Outcome, answers, loss_result, readings, recall, task_results
from bilevel.runtime.quality.tasks import QUICK_STRETCHES, STRETCHES, Source, draw_exams, draw_loss_text
from bilevel.runtime.quality.window import WindowReader, window_problem

SCORED_COST = 8  # a token that is scored takes about as long as so many that are read in a chunk
Progress = Callable[[str, float, float], None]
MassSession = Callable[[Bundle, Path], Session]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure. lengths: () takes what fits the model. against: None takes the bundle's own dense twin.

    names: what the report calls a folder that was made for the measurement.
    """

    bundle: Path
    against: Path | None = None
    checkpoint: Path | None = None
    lengths: tuple[int, ...] = ()
    tasks: tuple[str, ...] = tuple(TASKS)
    facts: int = 24
    seed: int = 0
    quick: bool = False
    text: Path | None = None
    floors: tuple[AskedFloor, ...] = ()
    backend: str = AUTO
    library: Path | None = None
    threads: int = 0
    verify: bool = True
    names: Mapping[Path, str] = field(default_factory=dict)

    def name(self, folder: Path) -> str:
        """A folder as the user gave it."""
        return self.names.get(folder, str(folder))


@dataclass(frozen=True)
class Side:
    """One of the models compared. open: makes its reader for so many tokens."""

    name: str
    what: str
    folder: Path
    open: Callable[[int], Reader]


@dataclass
class _Run:
    """What one measurement gathers."""

    request: Request
    exams: list[Exam]
    on_progress: Progress
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    mass_recall: dict[int, float] = field(default_factory=dict)
    infos: list[SideInfo] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def measure(
    request: Request, on_progress: Progress = lambda what, done, total: None, mass: MassSession | None = None
) -> QualityReport:
    """Measure. on_progress(what is done, work done, all work of all sides). mass: opens a checkpoint that chooses by true mass.

    Raises RequestError for what cannot be asked, BundleError, EngineError or MissingDependency where a bundle does not open.
    """
    start = time.perf_counter()
    bundle = load_bundle(request.bundle, request.verify)
    lengths = _lengths(request, bundle)
    tokenizer, wording = BundleTokenizer(bundle.tokenizer_path), load_wording(bundle.folder, bundle.files)
    rendered = RenderedEncoder(tokenizer) if wording.is_chat else None
    source = Source(tokenizer, wording, load_filler(request.text), request.seed, rendered)
    exams = list(_draw(source, request, lengths))
    run = _Run(request, exams, on_progress)
    sides = _sides(request, bundle, lengths, run.notes, mass)
    for index, side in enumerate(sides):
        _take(run, side, index, len(sides))
    plan = Plan(
        request.seed,
        request.tasks,
        lengths,
        request.facts,
        sum(exam.task == LOSS for exam in exams),
        source.filler.source,
        source.filler.sha256,
        source.wording.form,
        platform.python_version(),
    )
    return _report(run, bundle, plan, time.perf_counter() - start)


def _report(run: _Run, bundle: Bundle, plan: Plan, seconds: float) -> QualityReport:
    tasks, loss = task_results(run.exams, run.outcomes), loss_result(run.exams, run.outcomes)
    rows, held = answers(run.exams, run.outcomes), recall(run.exams, run.outcomes, bundle, run.mass_recall)
    floors = tuple(judge(floor, rows, loss, held) for floor in run.request.floors)
    machine = describe_machine(run.request.threads)
    return QualityReport(
        passed=all(floor.passed for floor in floors),
        bundle=run.request.name(run.request.bundle),
        bilevel=bilevel.__version__,
        machine=f"{machine['cpu']}, {machine['cores']} cores, {machine['system']} {machine['machine']}",
        routing=describe_routing(bundle),
        plan=plan,
        sides=tuple(run.infos),
        tasks=tasks,
        loss=loss,
        reading=readings(run.exams, run.outcomes),
        recall=held,
        floors=floors,
        not_measured=tuple(run.notes),
        answers=rows,
        seconds=seconds,
    )


def describe_routing(bundle: Bundle) -> str:
    """A bundle's routing in words."""
    routing = bundle.config["routing"]
    if routing["preset"] == "dense" or bundle.graph.routes is None:
        return "dense: every word reads everything"
    text = f"{routing['preset']}: {routing['topk']} blocks of {bundle.block_size} tokens"
    if bundle.graph.routes.candidates is not None:
        text += f", of {routing['coarse_topk']} candidates"
    count, layers = len(bundle.graph.routes.blocks), int(bundle.config["num_hidden_layers"])
    return text + (f"; {count} of {layers} layers are routed" if count < layers else "")


def _lengths(request: Request, bundle: Bundle) -> tuple[int, ...]:
    """The lengths asked for, or three that fit. Raises RequestError for one beyond the model's positions."""
    most = bundle.max_positions
    if not request.lengths:
        usual = [length for length in (1024, 4096) if length <= most] if request.quick else [1024, 2048, 4096]
        return tuple(length for length in usual if length <= most) or (most,)
    for length in request.lengths:
        if length > most:
            raise RequestError(f"{length} tokens are more than this model's {most} positions; give shorter --lengths")
    return tuple(sorted(set(request.lengths)))


def _draw(source: Source, request: Request, lengths: tuple[int, ...]) -> Iterable[Exam]:
    for task in request.tasks:
        if task == LOSS:
            stretches = QUICK_STRETCHES if request.quick else STRETCHES
            stretches = max(min(stretches, lengths[-1] // 4), 1)
            yield from (draw_loss_text(source, lengths[-1], index, stretches) for index in range(1 if request.quick else 2))
        else:
            for length in lengths:
                yield from draw_exams(source, task, length, request.facts)


def _sides(
    request: Request, bundle: Bundle, lengths: tuple[int, ...], notes: list[Note], mass: MassSession | None
) -> list[Side]:
    """The bundle first: where it cannot be run, nothing else need be."""

    def routed(capacity: int) -> Reader:
        session, _ = open_session(
            request.bundle, request.backend, verify=False, threads=request.threads, library=request.library
        )
        return Reader(session, capacity)

    sides = [Side(ROUTED, describe_routing(bundle), request.bundle, routed)]
    dense = _dense_side(request, bundle, lengths, notes)
    if dense is not None:
        sides.append(dense)
    if problem := window_problem(bundle):
        notes.append(Note(WINDOW, problem))
    else:
        what = f"the first blocks and the last, {bundle.config['routing']['topk']} in all"
        sides.append(
            Side(WINDOW, what, request.bundle, lambda capacity: WindowReader(OnnxSession(bundle, request.threads), capacity))
        )
    if request.checkpoint is None or mass is None:
        notes.append(Note(MASS, "it takes the bundle's checkpoint and PyTorch; give --checkpoint DIR"))
    elif bundle.graph.routes is None:
        notes.append(Note(MASS, "the bundle makes no choice of blocks"))
    else:
        session, checkpoint = mass(bundle, request.checkpoint), request.checkpoint
        what = "blocks chosen by their true attention mass, in PyTorch"
        sides.append(Side(MASS, what, checkpoint, lambda capacity: Reader(session, capacity)))
    return sides


def _dense_side(request: Request, bundle: Bundle, lengths: tuple[int, ...], notes: list[Note]) -> Side | None:
    if request.against is None:
        if bundle.twin is None:
            notes.append(Note(DENSE, "the bundle has no dense twin; name a dense bundle with --against DENSE"))
            return None
        twin, folder, what = bundle.dense_twin(), request.bundle, "the same weights with ordinary attention"
    else:
        twin, folder = load_bundle(request.against, request.verify), request.against
        if twin.files["tokenizer.json"].sha256 != bundle.files["tokenizer.json"].sha256:
            raise RequestError(f"{folder} has another tokenizer than {request.bundle}; give a bundle of the same family")
        if max(lengths) > twin.max_positions:
            raise RequestError(f"{max(lengths)} tokens are more than {folder} holds; give lengths up to {twin.max_positions}")
        what = describe_routing(twin)
    return Side(DENSE, what, folder, lambda capacity: Reader(OnnxSession(twin, request.threads), capacity))


def _take(run: _Run, side: Side, index: int, sides: int) -> None:
    """One side takes all exams. A side that does not open here is noted, except for the bundle itself."""
    start, total = time.perf_counter(), sum(map(work, run.exams))
    try:
        reader = side.open(max(exam.length for exam in run.exams))
    except (BundleError, EngineError, MissingDependency, RequestError) as error:
        if side.name == ROUTED:
            raise
        run.notes.append(Note(side.name, str(error)))
        return
    outcomes, done = [], 0.0
    for exam in run.exams:
        where = f"{side.name}: {exam.task}, {exam.length} tokens"
        run.on_progress(where, index * total + done, sides * total)
        before = done

        def report(part: float, where: str = where, before: float = before) -> None:
            run.on_progress(where, index * total + before + part, sides * total)

        outcomes.append(take(reader, exam, report))
        done += work(exam)
    run.outcomes[side.name] = outcomes
    session = reader.session
    if side.name == MASS:
        run.mass_recall.update(session.mass_recall())  # type: ignore[attr-defined]
    seconds = time.perf_counter() - start
    run.infos.append(SideInfo(side.name, side.what, run.request.name(side.folder), session.backend, session.device, seconds))


def work(exam: Exam) -> float:
    """How much there is to do, in tokens that are read."""
    return len(exam.context) + sum(len(each.suffix) + SCORED_COST * len(each.answer) for each in exam.questions)


def take(reader: Reader, exam: Exam, on_part: Callable[[float], None] = lambda part: None) -> Outcome:
    """The scores of every token of every answer. on_part: told the work done so far."""
    reader.rewind(0)
    if exam.context:
        reader.read(exam.context)
    done, outcome = float(len(exam.context)), []
    for question in exam.questions:
        on_part(done)
        if exam.task != LOSS:
            reader.rewind(len(exam.context))
        scores: list[TokenScore] = reader.score(
            question.suffix, question.answer, None if exam.task == LOSS else question.evidence
        )
        outcome.append(scores)
        done += len(question.suffix) + SCORED_COST * len(question.answer)
    return outcome
