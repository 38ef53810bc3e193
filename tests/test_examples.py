"""Where a prompt ends and a completion begins, in tokens; how examples are laid out; what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service import lengths, models
from service.errors import InvalidInput
from service.jobs import Example, JobSpec, PromptFormat, Turn
from tests import tiny
from tests.plain import EXAMPLES
from workers.examples import Encoded, Layout, Tokenizer, batches, encode


def bpe() -> Any:
    """The byte-level tokenizer of the tiny models."""
    return tiny.tokenizer()


@lru_cache
def unigram() -> str:
    """A tokenizer as Llama's: blanks are part of the words they precede, and one is put before the text.

    Trained once: its training does not give the same twice."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(tiny.CORPUS * 3, trainer)
    return str(made.to_str())


def sentencepiece(*, bos: bool = True, eos: bool = False) -> Any:
    """It, with the special tokens that a text gets."""
    from tokenizers import Tokenizer, processors

    made = Tokenizer.from_str(unigram())
    made.post_processor = processors.TemplateProcessing(
        single=" ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bpe": bpe,
    "sentencepiece": sentencepiece,
    "sentencepiece-eos": lambda: sentencepiece(eos=True),
}


def encoded(
    tokenizer: Tokenizer, *examples: Example, chat: bool = False, context: int | None = None, name: str = "examples"
) -> list[Encoded]:
    form = PromptFormat.CHAT if chat else PromptFormat.TEXT
    return encode(examples, tokenizer, prompt_format=form, context=context, name=name)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The capital of France is", " Paris."),
        ("The capital of France is ", "Paris."),
        ("The capital of France is", "Paris."),
        ("The capital of France is\n", "Paris."),
        ("The capital of Fra", "nce is Paris."),
        (" Answer:", " yes"),
        ("City: Lyon. Country:  ", "  France  "),
        ("Größe ☃ ist", " größer ☃"),
    ],
)
def test_prompt_and_completion_are_the_tokens_of_the_whole_text(kind: str, prompt: str, completion: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    (found,) = encoded(tokenizer, Example(prompt=prompt, completion=completion))
    whole = tokenizer(prompt + completion)["input_ids"]
    if kind.endswith("eos"):
        whole = whole[:-1]
    assert [*found.prompt, *found.continuations[0]] == whole
    # The prompt keeps every token that it has when it stands alone, up to the first that the completion changes.
    alone = tokenizer(prompt)["input_ids"]
    assert list(found.prompt) == alone[: len(found.prompt)]
    assert (
        len(found.prompt) == len(alone) - kind.endswith("eos") or whole[len(found.prompt)] != alone[len(found.prompt)]
    )


def test_a_blank_at_the_prompts_end_goes_to_the_completion_where_the_tokenizer_puts_it_there() -> None:
    tokenizer = bpe()
    (apart,) = encoded(tokenizer, Example(prompt="Country: ", completion="France"))
    (joined,) = encoded(tokenizer, Example(prompt="Country:", completion=" France"))
    assert (apart.prompt, apart.continuations) == (joined.prompt, joined.continuations)
    assert tokenizer.decode(apart.continuations[0]) == " France"


def test_all_choices_of_an_example_share_one_prompt() -> None:
    # Of "Country: " the blank becomes part of " France"; before "42" it stays, and belongs to both continuations.
    tokenizer = bpe()
    (found,) = encoded(tokenizer, Example(prompt="Country: ", completion="42", choices=["France", "42"]))
    assert [tokenizer.decode([*found.prompt, *c]) for c in found.continuations] == ["Country: France", "Country: 42"]
    assert found.gold == 1
    assert found.labels == ("France", "42")
    assert found.closed


def test_bos_comes_first_and_eos_never() -> None:
    example = Example(prompt="The capital", completion=" of France")
    (with_bos,) = encoded(sentencepiece(), example)
    (with_both,) = encoded(sentencepiece(eos=True), example)
    (with_neither,) = encoded(sentencepiece(bos=False), example)
    assert with_bos == with_both
    assert with_bos.prompt == (1, *with_neither.prompt)
    assert 2 not in (*with_both.prompt, *with_both.continuations[0])
    assert encoded(bpe(), example)[0].prompt[0] != bpe().bos_token_id


def test_a_chat_prompt_is_a_users_turn_and_the_completion_the_assistants() -> None:
    tokenizer = bpe()
    (found,) = encoded(tokenizer, Example(prompt="City: Lyon.", completion=" France"), chat=True)
    assert tokenizer.decode(found.prompt) == "<|user|>City: Lyon.<|end|><|assistant|>"
    assert tokenizer.decode(found.continuations[0]) == "France"  # a turn begins without the blank
    assert found.labels == (" France",)
    assert found.prompt[0] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_turns_stand_before_the_prompt_of_a_chat() -> None:
    tokenizer = bpe()
    roles: tuple[Literal["system", "user", "assistant"], ...] = ("system", "user", "assistant")
    turns = [Turn(role=role, content=f"{k}") for k, role in enumerate(roles)]
    (found,) = encoded(tokenizer, Example(prompt="City", completion="yes", turns=turns), chat=True)
    whole = "<|system|>0<|end|><|user|>1<|end|><|assistant|>2<|end|><|user|>City<|end|><|assistant|>"
    assert tokenizer.decode(found.prompt) == whole
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('x') }}{% endif %}"
    with pytest.raises(InvalidInput, match="some take no system message"):
        encoded(tokenizer, Example(prompt="City", completion="yes", turns=turns), chat=True)


def test_a_chat_template_that_writes_bos_gets_no_second_one() -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %} Answer:"
    (found,) = encoded(tokenizer, Example(prompt="City", completion="yes"), chat=True)
    assert found.prompt.count(1) == 1


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no chat template") as refused:
        encoded(sentencepiece(), Example(prompt="a", completion=" b"), chat=True)
    assert refused.value.param == "prompt_format"


def test_choices_that_a_turn_makes_the_same_are_refused_by_name() -> None:
    fine = Example(prompt="a", completion=" yes", choices=[" yes", " no"])
    same = Example(prompt="b", completion=" yes", choices=[" yes", "yes"])
    assert len(encoded(bpe(), fine, same)) == 2
    with pytest.raises(InvalidInput, match="two choices the same") as refused:
        encoded(bpe(), fine, same, chat=True, name="validation")
    assert refused.value.param == "validation[1].prompt"


def test_a_prompt_of_which_nothing_remains_is_refused() -> None:
    # "ye" alone is a token that "yes" does not begin with, and there is no BOS to predict from.
    tokenizer = bpe()
    assert tokenizer("yes", add_special_tokens=False)["input_ids"][0] != tokenizer("ye")["input_ids"][0]
    with pytest.raises(InvalidInput, match="nothing to predict from") as refused:
        encoded(tokenizer, Example(prompt="y", completion="es", choices=["es", "a"]))
    assert refused.value.param == "examples[0].prompt"


def test_an_example_over_the_context_is_refused_by_name_with_its_tokens() -> None:
    tokenizer = bpe()
    short = Example(prompt="red", completion=" blue")
    long = Example(prompt="red " * 20, completion="blue", choices=["blue", "green red green"])
    (whole,) = encoded(tokenizer, long)
    assert whole.length == len(tokenizer("red " * 20 + "green red green")["input_ids"])
    assert len(encoded(tokenizer, short, long, context=whole.length)) == 2
    with pytest.raises(InvalidInput) as refused:
        encoded(tokenizer, short, long, context=whole.length - 1, name="test")
    expected = models.too_long("test[1]", whole.length, whole.length - 1)
    assert (refused.value.param, refused.value.message) == ("test[1].prompt", expected.message)
    assert f"{whole.length} tokens" in refused.value.message


def test_api_and_worker_refuse_a_long_example_in_the_same_words(
    tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_models("llama")
    model = models.resolve(folder.parent, folder.name)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = [*tiny.learnable_examples(8), {"prompt": "red " * 300, "completion": " yes no"}]
    spec = JobSpec.parse({"model": folder.name, "examples": rows})
    with pytest.raises(InvalidInput) as in_api:
        lengths.check_lengths(model, spec)
    with pytest.raises(InvalidInput) as in_worker:
        encode(
            spec.examples,
            tokenizer,
            prompt_format=PromptFormat.TEXT,
            context=model.context_length,
            name="examples",
        )
    assert in_api.value.body() == in_worker.value.body()
    assert in_worker.value.param == "examples[8].prompt"


def test_nothing_to_encode_is_nothing() -> None:
    assert encoded(bpe()) == []


# --- layout -----------------------------------------------------------------------------------------------------


PACKED, FLAT = Layout(packed=True), Layout(packed=False)


def random_examples(count: int, seed: int = 0) -> list[Encoded]:
    """Prompts of 1 to 30 tokens; 1 to 6 continuations of 1 to 4 tokens from so few that they share beginnings."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    for _ in range(count):
        prompt = tuple(number(3, 99) for _ in range(number(1, 30)))
        tails = list(dict.fromkeys(tuple(number(1, 2) for _ in range(number(1, 4))) for _ in range(number(1, 6))))
        found.append(Encoded(prompt, tuple(tails), number(0, len(tails) - 1), tuple(map(str, tails))))
    return found


def read_back(examples: Sequence[Encoded], layout: Layout) -> dict[int, list[list[tuple[tuple[int, ...], int]]]]:
    """What each token of each continuation is predicted from, by following the masks: (visible tokens, token)."""
    found: dict[int, list[list[tuple[tuple[int, ...], int]]]] = {}
    for batch in batches(examples, layout):
        slots = batch.continuation_slot.tolist()
        lists: dict[int, list[tuple[tuple[int, ...], int]]] = {slot: [] for slot in slots}
        for query, token, continuation in zip(
            batch.token_query.tolist(), batch.token_id.tolist(), batch.token_continuation.tolist(), strict=True
        ):
            row, position = int(batch.query_row[query]), int(batch.query_position[query])
            if batch.visible.ndim == 3:
                seen = batch.visible[row, position]
            else:
                seen = batch.visible[row] & (torch.arange(batch.visible.shape[1]) <= position)
            assert batch.position_ids is not None
            positions = batch.position_ids[row][seen].tolist()
            assert positions == list(range(len(positions)))
            slot = slots[continuation]
            assert batch.row_example[row] == slot // batch.most_choices
            lists[slot].append((tuple(batch.input_ids[row][seen].tolist()), token))
        for e, i in enumerate(batch.examples):
            count = len(examples[i].continuations)
            found[i] = [lists[e * batch.most_choices + c] for c in range(count)]
            assert int(batch.gold[e]) == examples[i].gold
            assert bool(batch.closed[e]) == (count > 1)
    return found


@pytest.mark.parametrize(
    "layout", [PACKED, FLAT, Layout(packed=True, tokens=100), Layout(packed=False, tokens=100, answers=20)]
)
def test_each_token_is_predicted_from_its_prompt_and_what_comes_before_it_in_its_continuation(layout: Layout) -> None:
    examples = random_examples(60)
    assert any(len(e.continuations) == 1 for e in examples)
    found = read_back(examples, layout)
    assert sorted(found) == list(range(60))
    for i, example in enumerate(examples):
        for c, tokens in enumerate(example.continuations):
            expected = [((*example.prompt, *tokens[:k]), token) for k, token in enumerate(tokens)]
            assert found[i][c] == expected


def test_batches_keep_their_budgets_unless_one_example_alone_is_over() -> None:
    examples = random_examples(80)
    for layout in (Layout(packed=True, tokens=120), Layout(packed=False, tokens=120), Layout(packed=True, answers=12)):
        sizes = []
        for batch in batches(examples, layout):
            sizes.append(len(batch.examples))
            if len(batch.examples) > 1:
                assert batch.input_ids.numel() <= layout.tokens
                assert len(batch.query_row) <= layout.answers
        assert sum(sizes) == 80
        assert max(sizes) > 1


def test_a_long_example_is_not_in_a_batch_with_many_short_ones() -> None:
    examples = [Encoded((1,) * n, ((2,),), 0, ("",)) for n in (90, 88, 30, 30, 29, 10, 10)]
    found = list(batches(examples, Layout(packed=True, padding=4)))
    assert [batch.examples for batch in found] == [[0, 1], [2, 3, 4], [5, 6]]
    assert sum(batch.input_ids.numel() for batch in found) == 90 * 2 + 30 * 3 + 10 * 2
    assert len(list(batches(examples, Layout(packed=True, padding=1000)))) == 1


def test_a_packed_row_holds_each_shared_beginning_once() -> None:
    choices = ((1, 2, 3), (1, 2, 4), (1, 5, 6), (7,))
    example = Encoded((9, 9), choices, 0, tuple(map(str, choices)))
    (packed,) = batches([example], PACKED)
    assert packed.input_ids.tolist() == [[9, 9, 1, 2, 5]]
    (flat,) = batches([example], FLAT)
    assert sorted(flat.input_ids.tolist()) == [[9, 9, 1, 2], [9, 9, 1, 5]]
    assert len(flat.query_row) == len(packed.query_row) == 4


def test_the_same_examples_give_the_same_batches_in_whatever_order_equal_ones_stand() -> None:
    tokenizer = cast(Tokenizer, bpe())
    examples = encode(EXAMPLES, tokenizer, prompt_format=PromptFormat.TEXT, context=None, name="examples")
    one, two = next(batches(examples, PACKED)), next(batches(examples, PACKED))
    assert torch.equal(one.input_ids, two.input_ids)
    assert one.examples == two.examples
