"""The demo's task, and its promise to leave nothing running."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from workers.catalogue import SMOLLM2
from workers.demo.task import build_task, cities_with_countries


def test_the_task_is_the_same_for_the_same_seed() -> None:
    assert build_task(seed=3) == build_task(seed=3)
    assert build_task(seed=3) != build_task(seed=4)


def test_no_example_is_learnt_from_and_judged_on() -> None:
    task = build_task()
    assert (len(task.examples), len(task.test)) == (200, 300)
    prompts = [example.prompt for example in task.examples + task.test]
    assert len(set(prompts)) == len(prompts)


def test_every_city_has_one_country_and_does_not_name_it() -> None:
    rows = cities_with_countries()
    cities = [city for city, _ in rows]
    assert len(set(cities)) == len(cities)
    assert not [city for city, country in rows if country.lower() in city.lower()]
    assert ("Nairobi", "Kenya") in rows


def test_the_real_model_is_whole_and_adds_no_token_to_a_text(smollm2: Path) -> None:
    from tokenizers import Tokenizer

    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["num_hidden_layers"]) == ("llama", "float32", 30)
    assert not [key for key in config if key.startswith("_") or key == "quantization_config"]
    assert (smollm2 / "model.safetensors").stat().st_size == 538_090_408
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("Which country?\n Kenya").ids) == "Which country?\n Kenya"
    assert "<|im_start|>" in (smollm2 / "chat_template.jinja").read_text()
    assert "Apache License" in (smollm2 / "LICENSE").read_text()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_running(smollm2: Path, tmp_path: Path, how: signal.Signals) -> None:
    shutil.copytree(smollm2, tmp_path / "models" / SMOLLM2)
    command = [sys.executable, "-u", "-m", "workers.demo", "--data", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as demo:
        assert demo.stdout is not None
        lines = []
        for line in demo.stdout:
            lines.append(line)
            if "loading the model" in line:
                break
        # The demo, `c2i watch`, `c2i serve`, its Redis, its worker and the job's own process.
        started = psutil.Process(demo.pid).children(recursive=True)
        assert len(started) >= 5, "".join(lines)
        demo.send_signal(how)
        rest = demo.stdout.read()
    assert demo.returncode != 0
    assert "everything that was started is stopped" in rest
    assert [process for process in started if process.is_running()] == []
