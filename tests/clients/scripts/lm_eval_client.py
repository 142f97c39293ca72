"""lm-eval's `local-completions` and `local-chat-completions`, on a task of its own that is read from a local file."""

import json
import os
import tempfile
from pathlib import Path

from check import ADDRESS, KEY, MODEL, equal, raises, report

CACHE = tempfile.TemporaryDirectory()
os.environ |= {"OPENAI_API_KEY": KEY, "HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

ROWS = [
    {"question": "What is 47 + 38?", "choices": ["85.", "blue", "a dog"], "answer": 0},
    {"question": "Hello", "choices": ["xqzw", "Hello! Show me a picture.", "No"], "answer": 1},
]
# Nano's chat template, as the prompt of a completion.
TURN = "<|im_start|>user\n{{question}}<|im_end|>\n<|im_start|>assistant\n"
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: {text}
metadata: {{version: 1}}
"""
CHOICE = """
task: choice
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
PERPLEXITY = """
task: perplexity
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
GENERATE = """
task: generate
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 40, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def evaluate(kind, path, task, **arguments):
    """Return the first metric, with lm-eval's default tokenizer: the server's, from /tokenizer_info."""
    from lm_eval import simple_evaluate  # reads the environment
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        kind,
        model_args={"model": MODEL, "base_url": ADDRESS + path, "max_length": 4096, "max_retries": 1} | arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=os.fspath(folder), include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template=kind == "local-chat-completions",
    )
    return next(value for name, value in results["results"][task].items() if name.endswith(",none"))


def chat():
    equal(evaluate("local-chat-completions", "/v1/chat/completions", "spoken"), 1.0)


def loglikelihood():
    for tokenized in (True, False):
        found = evaluate("local-completions", "/v1/completions", "choice", auth_token=KEY, tokenized_requests=tokenized)
        equal(found, 1.0)


def rolling():
    perplexity = evaluate("local-completions", "/v1/completions", "perplexity", auth_token=KEY)
    assert 1 < perplexity < 1e9, perplexity


def generate_until():
    equal(evaluate("local-completions", "/v1/completions", "generate", auth_token=KEY), 1.0)
    # The same without a tokenizer.
    equal(evaluate("local-completions", "/v1/completions", "generate", tokenizer_backend=None), 1.0)


def errors():
    raises(Exception, lambda: evaluate("local-chat-completions", "/v1/nothing", "spoken"))


with CACHE as name:
    folder = Path(name)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for task, text in ((CHOICE, TURN), (PERPLEXITY, ""), (GENERATE, TURN)):
        body = COMMON.format(file=rows, text=json.dumps(text)) + task
        (folder / f"{body.split('task: ')[1].split()[0]}.yaml").write_text(body, encoding="utf-8")
    spoken = COMMON.format(file=rows, text=json.dumps("{{question}}")) + GENERATE.replace("generate\n", "spoken\n", 1)
    (folder / "spoken.yaml").write_text(spoken, encoding="utf-8")
    report(chat, loglikelihood, rolling, generate_until, errors)
