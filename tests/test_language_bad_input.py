"""What is wrong with a model, a file of prompts, a reward or a server is told on the command line before there is a
run: exit status 2, what is wrong by name and place, no folder left behind.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from headwater.cli import main
from headwater.language.recipe import LanguageRecipe
from palindromes import make_palindrome_model


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders and files, all wrong but the first, in their own way."""
    folder = tmp_path_factory.mktemp("given")
    names = ("good", "headless", "no_tokenizer", "no_weights", "broken_weights", "other_tokenizer", "no_model")
    found = {name: folder / name for name in names}
    make_palindrome_model(found["good"], steps=16)
    for name in names[1:-1]:
        shutil.copytree(found["good"], found[name])
    found["no_model"].mkdir()
    (found["no_tokenizer"] / "tokenizer.json").unlink()
    (found["no_tokenizer"] / "tokenizer_config.json").unlink()
    (found["no_weights"] / "model.safetensors").unlink()
    (found["broken_weights"] / "model.safetensors").write_bytes(b"no weights at all")
    small = BertConfig(
        vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, is_decoder=True
    )
    BertModel(small).save_pretrained(found["headless"])
    other = LlamaConfig(vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    LlamaForCausalLM(other).save_pretrained(found["other_tokenizer"])
    for name, lines in {
        "long": ['{"prompt": "0:", "answer": "0"}', '{"prompt": "' + "1" * 400 + '", "answer": "0"}'],
        "broken": ['{"prompt": "0:", "answer": "0"}', '{"prompt": '],
        "empty": [],
        "unanswered": ['{"prompt": "0:", "answer": "0"}', '{"prompt": "1:"}', '{"prompt": "2:", "answer": "0"}'],
    }.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("\n".join(lines))
    return found


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "/nowhere/at/all"], ["model = '/nowhere/at/all': there is no such folder"]),
        (["--model", "{no_model}"], ["model = '{no_model}'", "cannot be loaded as a causal language model"]),
        (["--model", "{no_weights}"], ["model = '{no_weights}'", "model.safetensors"]),
        (["--model", "{broken_weights}"], ["model = '{broken_weights}'", "cannot be loaded"]),
        (["--model", "{headless}"], ["model = '{headless}'", "lacks the weights cls.predictions"]),
        (["--model", "{no_tokenizer}"], ["model = '{no_tokenizer}'", "no tokenizer", "serialization file"]),
        (["--model", "{other_tokenizer}"], ["prompts.jsonl, line 2", "vocabulary", "belongs to another model"]),
        (["--prompts", "{long}"], ["{long}, line 2 has 40", "context of 256"]),
        (["--prompts", "{broken}"], ["{broken}, line 2: no JSON"]),
        (["--prompts", "{empty}"], ["{empty}: there are no prompts in it"]),
        (["--prompts", "{no_model}"], ["{no_model}: must be a file of prompts"]),
        (["--prompts", "{unanswered}", "--reward", "math"], ["{unanswered}, line 2 ('1:') has no answer"]),
        (["--reward", "beauty"], ["reward is 'beauty', must be math, preference, or a function"]),
        (["--reward", "no_such_module:judge"], ["verifier 'no_such_module:judge': there is no module no_such_module"]),
        (["--reward", "preference", "--reward-model", "{good}"], ["'{good}': has no weights for score.weight"]),
        (["--reward", "preference", "--reward-model", "{no_model}"], ["reward model '{no_model}'", "no tokenizer"]),
        (["--lora.rank", "2", "--lora.targets", "nothing"], ["lora.targets = nothing", "all-linear", "q_proj"]),
        (["--template", "{{nonsense}}"], ["line 1: the template asks for 'nonsense'"]),
        (["--device", "cuda:7"], ["device = 'cuda:7': auto, cpu, or a device that is there"]),
        (["--training.replayed", "6"], ["training.replayed = 6: must be a multiple of replay.per_condition = 20"]),
        (["--training.batch-size", "6"], ["training.batch_size = 6: must be a multiple of group_size = 20"]),
        (["--replay.per-condition-capacity", "3"], ["per_condition_capacity is 3", "per_condition = 20"]),
        (["--reset-every", "-1"], ["reset_every = -1: must not be negative"]),
        (["--vllm.url", "localhost"], ["url = 'localhost': must be like http://host:8000"]),
        (["--vllm.url", "http://127.0.0.1:{port}", "--vllm.start", "0.2"], ["vllm.url = ", "no healthy server"]),
    ],
)
def test_it_is_told_before_there_is_a_run(
    places: dict[str, Path], tmp_path: Path, flags: list[str], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as silent:  # a port of our own, where nobody listens
        silent.bind(("127.0.0.1", 0))
        filled = {name: str(path) for name, path in places.items()} | {"port": str(silent.getsockname()[1])}
        good, out = places["good"], tmp_path / "run"
        with pytest.raises(SystemExit) as ended:
            main([
                "train", "language", "--model", str(good), "--prompts", str(good / "prompts.jsonl"), "--reward",
                "palindromes:palindrome_reward", "--sampling.max-new-tokens", "8",
                "--training.iterations", "1", "--quiet", "--out", str(out), *(flag.format(**filled) for flag in flags),
            ])  # fmt: skip
    errors = capsys.readouterr().err
    said = "".join(letter for letter in errors if not letter.isspace() and letter != "│")  # boxes break lines anywhere
    assert [one for one in told if one.format(**filled).replace(" ", "") not in said] == []
    assert "Traceback" not in errors
    assert ended.value.code == 2
    assert not out.exists()


def test_a_recipe_without_model_or_prompts_says_what_to_name() -> None:
    with pytest.raises(ValueError, match="model: name a causal language model"):
        LanguageRecipe()
    with pytest.raises(ValueError, match="prompts: name a file"):
        LanguageRecipe(model="somewhere")


def test_without_transformers_the_error_names_the_extra_and_other_recipes_are_listed() -> None:
    hidden = "import sys, importlib.util as u; find = u.find_spec; "
    hidden += "u.find_spec = lambda name, *more: None if name == 'transformers' else find(name, *more); "
    hidden += "from headwater.cli import main; main(['list'])"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'headwater[language]'" in done.stdout
    assert "hypergrid" in done.stdout
