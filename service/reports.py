"""`report.json`: everything that an adaptation did, tried, measured and proved."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from service.goals import Goal, Target
from service.jobs import Difference, Drift, Gguf, JobResult, Objective, PromptFormat, Quantize, Scores
from service.strategies import OPTIONS, Strategy, StrategyOptions
from service.strict import Strict


class SplitSizes(Strict):
    """Examples in each split, after exact duplicates were dropped. `folds` is set where few examples were
    cross-fitted: gradient and selection then are the same examples, each judged by folds without it."""

    gradient: int
    selection: int
    test: int
    folds: int | None = None
    duplicates_dropped: int = 0
    cross_validated: bool = False


class Metrics(Scores):
    """`Scores` with what shows a collapse to one label. `confusion[gold][predicted]` counts, over the choices."""

    n: int
    accuracy_interval: tuple[float, float] | None
    """95 % (Wilson), as `exact_match_interval` is."""
    exact_match_interval: tuple[float, float]
    balanced_accuracy: float | None
    majority_rate: float
    confusion: dict[str, dict[str, int]] | None


class Candidate(Strict):
    """One plan that the search tried: its size, what first order predicted and what came out, on the `examples` of
    the selection split that it was judged on (all, or a part for one that fell behind). Losses are means per
    example, `base_loss` that of the model it was tried on: the one before the pass, or where a pass composes
    several reductions, the one with those it had kept by then."""

    description: str
    """What it removes, in words."""
    size: int
    """How many components and structures it removes. A component of a row block counts as one."""
    examples: int
    base_loss: float
    predicted_loss: float | None
    """Null where first order says nothing: no gradient was taken, or not for these components."""
    loss: float | None
    """Null where it leaves the model without a finite one."""
    accuracy: float | None
    exact_match: float
    seconds: float


class PassReport(Strict):
    """One round of backward, ranking and search."""

    number: int
    base_loss: float
    candidates: list[Candidate]
    chosen: int
    """Components and structures removed by this pass; 0 where it was not accepted."""
    loss: float
    p: float
    """Of the paired, one-sided test that the loss fell. `components` accepts by it; `laser` and `c2i`, as their
    papers do, accept what has the higher accuracy, or the same and a lower loss."""
    accepted: bool
    reason: str
    withdrawn: bool = False
    """Accepted, and not returned: on the selection split fewer answers were right than the base's, by this pass or by
    those after it too."""
    still_falling: bool
    seconds: float


class ChangedExample(Strict):
    """A test example that the adapted model answers otherwise than the base. Texts are cut where they are long."""

    prompt: str
    completion: str
    choices: list[str] | None
    """Null where there are none, or too many to show."""
    base_answer: str
    """The likeliest choice; where there are no choices, how greedy decoding goes on."""
    adapted_answer: str
    base_correct: bool
    adapted_correct: bool


class TargetModule(Strict):
    """A weight that components may be removed from: `kind` is its name within its block, `self_attn.q_proj`."""

    module: str
    layer: int
    kind: str
    components: int
    """How many it has in all. A component of a row block counts as one, where some were removed in row blocks."""


class PlanEntry(Strict):
    """What is removed from one module: `components` are indices into its singular values, largest first."""

    module: str
    rows: str | None = None
    """The block of the weight's rows that the components are of, `0:192` or `cluster 2/8`; null for all rows."""
    shape: tuple[int, int]
    components: list[int]
    relative_norm: float
    """Frobenius norm of what is removed over that of the weight, all its rows."""


class RemovedStructures(Strict):
    """What is removed of the structures in one place, beside components."""

    kind: str
    """`heads`, `groups`, `neurons`, `attention`, `mlp`, `layers`, `blocks64` or `2:4`."""
    unit: str
    """Where: `model.layers.3.self_attn`."""
    layer: int
    indices: list[int]
    """Which of them; tiles are counted row after row."""
    count: int
    """How many there are."""
    parameters: int
    """Those that are of no use any more: cut off `model/`, or zeros in it; `shipped` says which."""


class Zeros(Strict):
    """Structures that are removed and stand as zeros in `model/`."""

    what: str
    """By kind and place: `the MLP of layers 3 and 7`."""
    why: str
    """Why transformers would load nothing smaller."""


class Shipped(Strict):
    """What `model/` is beside the base: `model/manifest.json` holds the same."""

    parameters: int
    """Numbers that the model has which is loaded from it."""
    bytes: int
    """Of its weights' files."""
    layers: list[int] | None
    """The base's blocks that are in it, by their index there; null for all of them."""
    gone: list[str]
    """What is really gone, in words: `layers 3 and 7`."""
    zeros: list[Zeros]

    def words(self, of_base: int) -> list[str]:
        """What is really gone, and what stands as zeros, a sentence each; none of what there is nothing.

        Args:
            of_base: its parameters.
        """
        words = []
        if self.gone:
            part = f"{100 * self.parameters / of_base:.1f} %"
            words.append(
                f"model/ has {self.parameters:,} parameters, {part} of the base's: without {'; '.join(self.gone)}."
            )
        if self.zeros:
            words.append(f"Standing as zeros: {'; '.join(f'{each.what} ({each.why})' for each in self.zeros)}.")
        return words


class Factored(Strict):
    """`factored/`: the same model with its weights of low rank as two factors each, and what loads them."""

    weights: int
    """Those in two factors."""
    parameters: int
    bytes: int
    """Of its weights' files."""


class SkippedModule(Strict):
    """A weight inside the blocks that cannot be handled, and why."""

    module: str
    reason: str


class Verification(Strict):
    """Largest absolute difference of logits between the artifact reloaded from disk and the adapted model."""

    adapter: float | None
    """Null where there is none: `compress` publishes no adapter."""
    model: float
    """Of all points the largest."""


class Speed(Strict):
    """What a checkpoint takes and how fast it is on the worker's machine: the best of several prompts of 256
    tokens and of the tokens decoded after them. Base and results take turns."""

    bytes: int
    """Of its weights' files."""
    peak_memory_bytes: int
    """The most that a process which only loads and runs it took, Python and torch with it; on a GPU the most that was
    allocated there."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    """Null for a masked language model, which decodes nothing."""
    joules_per_token: float | None
    """Of a decoded token, all that the processor or GPU used meanwhile; null where the machine does not tell."""


class Speeds(Strict):
    """What is shipped beside the base."""

    base: Speed
    model: Speed
    quantized: Speed | None = None


class CurvePoint(Strict):
    """What one round of `compress` left, on the test split."""

    number: int
    """Of the round, from 1."""
    parameters: float
    """As a fraction of the base's; tiles count where they are zeros in the file."""
    bytes: float
    """Of the weight files, as a fraction of the base's."""
    removed: str
    """What structures the round removed, in words."""
    accuracy: float | None
    exact_match: float
    loss: float | None
    """Null where the model has no finite one."""
    speed: Speed | None = None
    path: str
    """The folder among the job's files: `points/2/model`, of the last round `model`."""


class Quantized(Scores):
    """`quantized/`: the model in fewer bits, tested again on the same examples; where those are cross-validated, on the
    examples that the model was made from, so that the difference alone says something."""

    bits: Quantize
    method: str
    """How, in words."""
    library: str
    """Its name and version."""
    dtype: str
    """Of what is not quantized: embeddings, head, norms."""
    bytes: int
    """Of its weights' files."""
    fraction: float
    """Of the bytes of the base's."""
    differences: list[Difference]
    """Quantized minus the model that it was made from."""
    verification: float
    """Largest absolute difference of logits between `quantized/` reloaded from disk and what was tested."""


class GgufFile(Strict):
    """`gguf/`: the model as one file for llama.cpp, read back and found to give the same logits."""

    kind: Gguf
    path: str
    """`gguf/model-q8_0.gguf`."""
    bytes: int


class Cost(Strict):
    """Time and memory. FB is one forward and backward over the gradient split, measured in this run."""

    stages: dict[str, float]
    """Seconds a stage; keys are `Stage` values, `test` for the evaluations on the test split."""
    fb_seconds: float
    adaptation_fb: float
    """Backward, ranking and searching, in FB: all but loading, decomposing, verifying, the test and publishing."""
    stages_fb: dict[str, float]
    peak_memory_bytes: int
    adapter_bytes: int
    """Of the adapter's folder without its model card, as `model_bytes` is of the model's."""
    model_bytes: int


class Outlook(Strict):
    """Whether the loss was still falling when the passes ended, and what another pass would cost."""

    still_falling: bool
    next_pass_seconds: float
    message: str


class ModelInfo(Strict):
    """The base model. `revision` is its commit, or for a local folder the sha256 of its weights' headers and
    configuration."""

    id: str
    revision: str
    architecture: str
    dtype: str
    parameters: int
    target_modules: int
    components: int


class Report(JobResult):
    """`report.json`: everything that was done, tried, measured and proved."""

    schema_version: Literal[1] = 1
    model: ModelInfo
    goal: Goal = Goal.IMPROVE
    target: Target | None = None
    """Of `compress`: what was asked for."""
    strategy: Strategy
    strategy_options: StrategyOptions | None = None
    """As they were in force, defaults filled in."""
    objective: Objective
    prompt_format: PromptFormat
    seed: int
    passes_requested: int
    splits: SplitSizes
    base: Metrics
    after_first_pass: Metrics | None
    """Null where the pass was not accepted, or left the model without a finite loss on the test split."""
    adapted: Metrics
    differences: list[Difference]
    """Every metric's difference; `difference` is the one the verdict stands on."""
    first_pass_differences: list[Difference]
    first_pass_drift: Drift | None
    """Of the model after the first pass; `drift` is that of what is returned."""
    max_drift: float | None
    """The bound that was asked for."""
    passes: list[PassReport]
    curve: list[CurvePoint] = Field(default_factory=list)
    """Of `compress`: a point a round, each smaller than the one before; the last is what is returned."""
    outlook: Outlook
    gained: int
    """Examples of the test split that the adapted model alone gets right: the likeliest choice, or exact match."""
    lost: int
    """Those that the base alone gets right."""
    changed: list[ChangedExample]
    """At most ten of those, of both kinds; then of those that both get wrong, each in its own way."""
    plan: list[PlanEntry]
    structures: list[RemovedStructures] = Field(default_factory=list)
    """What is removed beside components."""
    modules: list[TargetModule]
    """Every one that could be touched, in the model's order."""
    skipped_modules: list[SkippedModule]
    factored: Factored | None = None
    """Null where it would not save a hundredth of the model's numbers."""
    shipped: Shipped | None = None
    """Null in reports of before there was such."""
    verification: Verification
    rounding_loss: float | None
    """Mean loss of the returned model, minus what it would be without rounding the pruned weights to the model's 16
    bits, over up to 100 examples of the test split (of all examples, where there is none). Null for a model in
    float32 or float64."""
    quantized: Quantized | None = None
    """Where the job asked for it."""
    not_quantized: str | None = None
    """Why there is no `quantized/`, where the job asked for it."""
    gguf: GgufFile | None = None
    """Where the job asked for it."""
    not_gguf: str | None = None
    """Why there is no `gguf/`, where the job asked for it."""
    speed: Speeds | None = None
    """Measured only where what is shipped is smaller or quantized, else it is as the base is; and of no model of less
    than a megabyte, which has no speed to speak of."""
    cost: Cost
    versions: dict[str, str]

    @field_validator("strategy_options", mode="before")
    @classmethod
    def _of_the_strategy(cls, value: object, info: ValidationInfo) -> object:
        """Options of different strategies may look alike."""
        return OPTIONS[info.data["strategy"]].model_validate(value) if isinstance(value, dict) else value

    def shipped_words(self) -> list[str]:
        """What `model/` is beside the base, and what `factored/` is, in sentences."""
        return (self.shipped.words(self.model.parameters) if self.shipped else []) + self._factored_words()

    def _factored_words(self) -> list[str]:
        if self.factored is None or self.shipped is None:
            return []
        part = self.factored.bytes / self.shipped.bytes
        return [
            f"factored/ has {self.factored.weights:,} weights as two factors each: {self.factored.parameters:,} "
            f"parameters, {100 * part:.1f} % of model/'s bytes."
        ]

    def brief(self) -> JobResult:
        """What the job's record holds of it."""
        return JobResult(
            improved=self.improved,
            verdict=self.verdict,
            base=Scores(accuracy=self.base.accuracy, exact_match=self.base.exact_match, loss=self.base.loss),
            adapted=Scores(
                accuracy=self.adapted.accuracy, exact_match=self.adapted.exact_match, loss=self.adapted.loss
            ),
            difference=self.difference,
            removed=self.removed,
            drift=self.drift,
        )
