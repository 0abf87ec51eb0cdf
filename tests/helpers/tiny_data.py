"""A tiny T5 on disk beside four data sets in the hub's schema, and the command line on them."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from pemt_fast import cli

WORDS = "good bad fine film plot dull bright the a was".split()


def write_tiny_data(folder):
    """Writes `t5` and `glue__` sst2, cola, mrpc and rte into `folder` and returns it."""
    texts = ["sentence:", "sentence1:", "sentence2:", "negative", "positive", "equivalent",
             "not_equivalent", "acceptable", "unacceptable", "entailment", "not_entailment",
             *WORDS]  # fmt: skip
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *texts])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "t5")
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=1,
            decoder_start_token_id=0,
        )
    ).save_pretrained(folder / "t5")  # fmt: skip
    one, two = ["sentence"], ["sentence1", "sentence2"]
    for name, columns in (("sst2", one), ("cola", one), ("mrpc", two), ("rte", two)):
        name = f"glue__{name}"
        (folder / name).mkdir()
        for split, count in (("train", 40), ("validation", 12)):
            rows = [
                {c: f"the film was {WORDS[(i + j) % 7]}" for j, c in enumerate(columns)}
                | {"label": i % 2, "idx": i}
                for i in range(count)
            ]
            path = folder / name / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_cli(*arguments):
    """Run the command; returns its exit code."""
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0
