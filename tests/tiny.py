"""Tiny random models of real architectures, saved as a user would have them: config, safetensors, tokenizer.

python -m tests.tiny llama /tmp/tiny-llama
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HIDDEN = 32
LAYERS = 2
CONTEXT = 256

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
CORPUS = [
    "The capital of France is Paris.",
    "Which country is this city in? City: Lyon. Country: France",
    "Is this sentence good or bad? Answer: good",
    "Answer: yes Answer: no yes no positive negative red green blue",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows every byte and has learnt a few dozen merges from `CORPUS`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=CONTEXT
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def masked_bpe() -> PreTrainedTokenizerFast:
    """As RoBERTa's: a byte-level BPE whose mask token swallows the blank before it; padding is token 1."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 3, trainer)
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=CONTEXT,
    )


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, words in pieces, no blanks."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.train_from_iterator([*CORPUS * 3, "item 0123456789 9876543210"], trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=CONTEXT,
    )


def _rotary(**more: Any) -> dict[str, Any]:
    """The keys that Llama's descendants share: grouped-query attention, a gated feed-forward."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        **more,
    }


_GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT}

# Name -> (`model_type` of transformers, keys of its config).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _rotary(tie_word_embeddings=True)),
    "qwen2": ("qwen2", _rotary()),
    "qwen3": ("qwen3", _rotary(head_dim=16)),
    "gemma2": ("gemma2", _rotary(head_dim=8, sliding_window=32, query_pre_attn_scalar=8)),
    "gemma3": ("gemma3_text", _rotary(head_dim=8, sliding_window=32, query_pre_attn_scalar=8)),
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
        },
    ),
    # Every second layer sees a window of 16, which its config does not call a sliding window.
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_layers": LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "phi": ("phi", _rotary(num_key_value_heads=4)),
    "phi3": ("phi3", _rotary()),
    "mistral": ("mistral", _rotary(sliding_window=16)),
}

# Mixtures of experts: most of their weights are no matrices of a module, and tokens are regrouped.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _rotary(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": (
        "qwen2_moe",
        _rotary(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24),
    ),
}

# Models that change in place what a module has given them: OLMo clips queries, keys and values, CTRL scales embeddings.
IN_PLACE: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo": ("olmo", _rotary(clip_qkv=0.5)),
    "ctrl": ("ctrl", {**_GPT, "dff": 48}),
}

_BERT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}

# Masked language models. RoBERTa's positions begin behind its padding token's; MobileBERT never calls its head;
# ALBERT's layers are one that is called again and again; ModernBERT sees a window in some of its layers; DeBERTa's
# query and key projections also take embeddings of distances.
MASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("roberta", _BERT | {"max_position_embeddings": CONTEXT + 2}),
    "bert": ("bert", _BERT),
    "distilbert": (
        "distilbert",
        {"dim": HIDDEN, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4, "max_position_embeddings": CONTEXT},
    ),
    "albert": ("albert", _BERT | {"embedding_size": 16}),
    "mobilebert": (
        "mobilebert",
        _BERT
        | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 2},
    ),
    "modernbert": ("modernbert", _BERT | {"num_hidden_layers": 3, "local_attention": 16}),
    "deberta": (
        "deberta-v2",
        _BERT | {"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
    ),
}
BYTE_LEVEL_MASKED = frozenset({"roberta", "modernbert"})


def tokenizer_for(architecture: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a tiny model."""
    if architecture not in MASKED:
        return tokenizer()
    return masked_bpe() if architecture in BYTE_LEVEL_MASKED else wordpiece()


def build(
    architecture: str,
    folder: Path,
    dtype: str = "float32",
    seed: int = 0,
    *,
    shape: Mapping[str, int] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> Path:
    """Save a random model of the architecture and its tokenizer into `folder`.

    `shape` overrides keys of its config; `prepare` sees the model before it is saved. The weights are drawn ten times
    wider than transformers does: at its 0.02 a tiny model's outputs are all but constant and gradients vanish in
    rounding.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    made = tokenizer_for(architecture)
    model_type, keys = (ARCHITECTURES | MIXTURES | IN_PLACE | MASKED)[architecture]
    auto_model: Any = AutoModelForMaskedLM if architecture in MASKED else AutoModelForCausalLM
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(made) + 8,  # as real models have: more rows than tokens, and Qwen's tokenizer adds one
        initializer_range=0.2,
        bos_token_id=made.eos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
        **{**keys, **(shape or {})},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_model.from_config(config, dtype=getattr(torch, dtype))
        # Biases start at zero and norms at one everywhere: a bug that swaps or drops them would not show.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    if prepare is not None:
        prepare(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def learnable_examples(count: int = 80) -> list[dict[str, Any]]:
    """Examples of a small closed task, no two alike."""
    labels = [" yes", " no", " red"]
    return [{"prompt": f"Item {i}: answer", "completion": labels[i % 3], "choices": labels} for i in range(count)]


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.write(json.dumps({"architecture": sys.argv[1], "folder": sys.argv[2]}) + "\n")
