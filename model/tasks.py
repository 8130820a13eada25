"""What a model is exported for: tasks by the names of transformers and optimum, and which architecture has which.

`image-feature-extraction` is the name of transformers' pipeline; optimum's `TasksManager` takes it for another word for
`feature-extraction`.
"""

from __future__ import annotations

from model.bundle import DECODER, EMBEDDING, VISION_ENCODER
from model.errors import UsageError

TEXT_GENERATION = "text-generation"
IMAGE_TEXT_TO_TEXT = "image-text-to-text"
FEATURE_EXTRACTION = "feature-extraction"
IMAGE_FEATURE_EXTRACTION = "image-feature-extraction"
TEXT_CLASSIFICATION = "text-classification"
TOKEN_CLASSIFICATION = "token-classification"
QUESTION_ANSWERING = "question-answering"

GENERATION = (TEXT_GENERATION, IMAGE_TEXT_TO_TEXT)
CLASSIFICATION = (TEXT_CLASSIFICATION, TOKEN_CLASSIFICATION)
TASKS = (*GENERATION, FEATURE_EXTRACTION, IMAGE_FEATURE_EXTRACTION, *CLASSIFICATION, QUESTION_ANSWERING)
# Outputs of the decoder's graph where it does not generate, as transformers and optimum call them.
HEAD_OUTPUTS: dict[str, tuple[str, ...]] = {
    FEATURE_EXTRACTION: ("last_hidden_state",),
    **dict.fromkeys(CLASSIFICATION, ("logits",)),
    QUESTION_ANSWERING: ("start_logits", "end_logits"),
}
AUTO = "auto"
WITH_PAST = "-with-past"  # optimum's mark of graphs that take a cache, which ours of these tasks all do

# Architecture, as config.json names it, → its tasks, its own first; text models, then multimodal ones.
_TEXT: dict[str, tuple[str, ...]] = {
    "Exaone4ForCausalLM": (TEXT_GENERATION, FEATURE_EXTRACTION),
    "Exaone4Model": (FEATURE_EXTRACTION,),
    "Exaone4ForSequenceClassification": (TEXT_CLASSIFICATION, FEATURE_EXTRACTION),
    "Exaone4ForTokenClassification": (TOKEN_CLASSIFICATION, FEATURE_EXTRACTION),
    "Exaone4ForQuestionAnswering": (QUESTION_ANSWERING, FEATURE_EXTRACTION),
}
_MULTIMODAL: dict[str, tuple[str, ...]] = {
    "Exaone4_5_ForConditionalGeneration": (IMAGE_TEXT_TO_TEXT, FEATURE_EXTRACTION, IMAGE_FEATURE_EXTRACTION),
    "Exaone4_5_Model": (FEATURE_EXTRACTION, IMAGE_FEATURE_EXTRACTION),
}


def architecture_of(named: str | None, *, vision: bool) -> str:
    """The architecture that `named` is; where it is none of ours, the one that generates."""
    known = _MULTIMODAL if vision else _TEXT
    return named if named in known else next(iter(known))


def possible_tasks(architecture: str, *, vision: bool) -> tuple[str, ...]:
    """What a checkpoint of this architecture can be exported for; what it is made for comes first."""
    return (_MULTIMODAL if vision else _TEXT)[architecture]


def choose_task(asked: str, architecture: str, *, vision: bool) -> str:
    """The task that `--task` means.

    Args:
        asked: "auto", or a task; generation tasks may end in "-with-past".
        architecture: of the checkpoint, from `architecture_of`.
        vision: whether the model sees.

    Raises:
        UsageError: there is no such task, or the architecture has no weights for it.
    """
    possible = possible_tasks(architecture, vision=vision)
    if asked == AUTO:
        return possible[0]
    task = asked.removesuffix(WITH_PAST)
    remedy = f"Possible: {', '.join((AUTO, *possible))}"
    if task not in TASKS:
        raise UsageError("cannot export", "--task", f"there is no task {asked[:60]!r}", remedy)
    if task not in possible:
        raise UsageError("cannot export", "--task", f"{architecture} does no {asked[:60]}", remedy)
    if asked != task and task not in GENERATION:
        raise UsageError("cannot export", "--task", f"{task} needs no past", remedy)
    return task


def graphs_of(task: str, *, vision: bool) -> tuple[str, ...]:
    """The graphs that a task needs, in the order they run; a draft head may come on top."""
    if task == IMAGE_FEATURE_EXTRACTION:
        return (VISION_ENCODER,)
    return (VISION_ENCODER, EMBEDDING, DECODER) if vision else (DECODER,)
