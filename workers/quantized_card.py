"""What model cards say of size, speed and the quantized form."""

from __future__ import annotations

from service.reports import Quantized, Report
from service.sizes import size_rows


def size_table(report: Report) -> str:
    """What base and result weigh and how fast they are; nothing where it was not measured."""
    rows = size_rows(report)
    if not rows:
        return ""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    where = "Measured where the job ran: memory is the most of a process that loads and runs it, Python and torch too."
    return "\n".join(lines) + f"\n\n{where}\n\n"


def quantized_use(quantized: Quantized, ask: str, *, masked: bool, unseen: bool) -> str:
    """How to load `quantized/`.

    Args:
        ask: lines that get an answer of `model` by `tokenizer`.
        unseen: whether it was tested on examples that the model was not made from.
    """
    where = "On the test examples" if unseen else "On the examples that the model was made from"
    auto = "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"
    return f"""## Use

These are the weights of `model/` in {quantized.method} ({quantized.library}); embeddings, head and norms are in
{quantized.dtype}. {where} its {_told(quantized)}. With transformers and `pip install \
{quantized.library.partition(" ")[0]}`:

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("quantized", dtype="auto").eval()  # this folder
tokenizer = AutoTokenizer.from_pretrained("quantized")
{ask}
```
"""


def _told(quantized: Quantized) -> str:
    found = quantized.differences[0]
    name = found.metric.replace("_", " ")
    return (
        f"{name} is {getattr(quantized, found.metric):.3f}, {found.value:+.3f} against `model/` (95 % interval "
        f"{found.low:+.3f} to {found.high:+.3f})"
    )
