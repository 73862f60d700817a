"""What a Hugging Face model is to do: its task, the class that does it, and how many labels that has.

The libraries fill a head that no file holds with random numbers. So the task decides which head there is, and the
trained head's own shape how many labels it has; huggingface.py then holds the model to both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import folders
from .errors import UsageError
from .folders import Adapter

TASKS = {
    "audio-classification": "AutoModelForAudioClassification",
    "causal-lm": "AutoModelForCausalLM",
    "feature-extraction": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "multiple-choice": "AutoModelForMultipleChoice",
    "object-detection": "AutoModelForObjectDetection",
    "question-answering": "AutoModelForQuestionAnswering",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "seq2seq-decoder": "AutoModelForSeq2SeqLM AutoModelForSpeechSeq2Seq",
    "seq2seq-encoder": "AutoModelForSeq2SeqLM AutoModelForSpeechSeq2Seq",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "token-classification": "AutoModelForTokenClassification",
}
IN_STEPS = ("seq2seq-decoder", "seq2seq-encoder", "text-generation")  # what generates token by token
_OF_ADAPTERS = {  # PEFT's word for it
    "CAUSAL_LM": "causal-lm",
    "FEATURE_EXTRACTION": "feature-extraction",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}


def check(task: str | None) -> None:
    if task is not None and task not in TASKS:
        raise UsageError(f"--task {task}: there is no such task; there are {', '.join(TASKS)}.")


def of_adapter(adapter: Adapter) -> str | None:
    """The task that an adapter was trained for, as far as its settings say."""
    return _OF_ADAPTERS.get(str(adapter.settings.get("task_type")))


def model_class(config: Any, task: str | None, adapters: Sequence[Adapter], where: str) -> Any:
    """The transformers class for `task`, else for the adapters' task, else the one that config.json names.

    UsageError where the architecture has no such class, or the adapters were trained for different tasks.
    """
    if task is None:
        said = {name for one in adapters if (name := of_adapter(one))}
        if len(said) > 1:
            raise UsageError(
                f"the adapters were trained for {' and '.join(sorted(said))}: choose one by --task."
            )
        task = next(iter(said), None)
    if task is not None:
        return _of_task(config, task, where)
    # without a task PEFT notes the class that it wrapped: a name, looked up in transformers and nowhere else
    noted = [one.settings.get("auto_mapping") for one in adapters]
    names = [note.get("base_model_class") for note in noted if isinstance(note, dict)]
    named = next((found for name in names if (found := _named(name))), None)
    return named or own_class(config) or _of_task(config, "feature-extraction", where)


def own_class(config: Any) -> Any:
    """The transformers class that the config names first; None where it names none that exists."""
    return next((found for name in config.architectures or () if (found := _named(name))), None)


def set_labels(kind: Any, config: Any, held: Sequence[Mapping[str, Tensor]]) -> None:
    """Set `config.num_labels` to the size of the trained head, which the first of `held` that has it tells."""
    for name, axis in _heads(kind, config).items():
        for tensors in held:
            if name in tensors and tensors[name].dim() > axis:
                config.num_labels = int(tensors[name].shape[axis])
                return


def _heads(kind: Any, config: Any) -> dict[str, int]:
    """Parameters whose size is the number of labels, and on which axis: those that grow with it."""
    more, count = copy.deepcopy(config), config.num_labels
    more.num_labels = count + 1
    before, after = shapes(kind, config), shapes(kind, more)
    return {
        name: axis
        for name, shape in before.items()
        for axis, size in enumerate(shape)
        if size == count and after.get(name, shape)[axis] == count + 1
    }


def shapes(kind: Any, config: Any) -> dict[str, torch.Size]:
    """Names and shapes of a model's tensors, without making any."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in kind(config).state_dict().items()}


def _of_task(config: Any, task: str, where: str) -> Any:
    if task == "feature-extraction" and config.is_encoder_decoder:
        # the encoder alone is what gives features: the whole would ask for the decoder's input
        encoder = _named(type(config).__name__.replace("Config", "EncoderModel"))
        if encoder is not None:
            return encoder
    choices = folders.attempt(lambda: _choices(config, task), where, f"find {TASKS[task]}")
    own = own_class(config)
    found = own if own in choices else next(iter(choices), None)
    if found is None:
        able = [name for name in TASKS if _choices(config, name)]
        raise UsageError(
            f"--task {task}: a {config.model_type} model can do {', '.join(able) or 'none of the tasks'}."
        )
    return found


def _choices(config: Any, task: str) -> list[Any]:
    """The transformers classes that do a task with this architecture."""
    import transformers

    found = [getattr(transformers, auto)._model_mapping.get(type(config), ()) for auto in TASKS[task].split()]
    return [one for some in found for one in (some if isinstance(some, (list, tuple)) else [some])]


def _named(name: Any) -> Any:
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None
