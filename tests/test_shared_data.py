"""Every real data set beside this checkout, from its folder through its template to an update."""

import json
from pathlib import Path

import pytest
import torch
from t5_factory import pemt_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import pemt_fast
from pemt_fast.data import TASKS, load_rows, load_splits, tokenize
from pemt_fast.training.metrics import compute

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
FOLDERS = {task.folder: task.name for task in TASKS.values()}
# Without the folder one case is left, which the fixture skips and says why.
PRESENT = sorted(path.parent.name for path in SHARED.glob("*/train.jsonl")) or ["none"]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level pairs learnt from a few words: any text has ids, nothing is unknown."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.train_from_iterator(
        ["question: context: premise: hypothesis: sentence: answer the of and to a in is that it"],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("folder", PRESENT)
def test_a_real_set_trains(shared_data, tokenizer, folder):
    assert folder in FOLDERS, f"no task reads {folder}"
    name = FOLDERS[folder]
    splits = load_splits(name, shared_data, limit_train=4, limit_eval=4)
    assert all((splits.train, splits.validation, splits.test))
    rows = tokenize(splits.train, tokenizer, max_source_length=64, max_target_length=32)
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=1,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    model = pemt_fast.get_model(T5ForConditionalGeneration(config), pemt_config()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    # What a perfect model would write scores full marks, as names and as numbers.
    for style in ("name", "index"):
        test = load_splits(name, shared_data, limit_eval=40, label_style=style).test
        scores = compute(name, [e.target for e in test], test)
        assert scores["average"] == pytest.approx(100.0), scores


def test_every_set_is_covered(shared_data):
    assert {FOLDERS.get(folder) for folder in PRESENT} >= {"cr", "mpqa", "sst5", "imdb"}


@pytest.mark.parametrize("name", ["cr", "mpqa", "sst5", "subj"])
def test_label_order_is_that_of_the_label_texts(shared_data, name):
    rows = load_rows(name, shared_data)
    assert {(TASKS[name].labels[row["label"]], row["label_text"]) for row in rows} == {
        (label, label) for label in TASKS[name].labels
    }


# The first training row of each, its text put together by hand.
EXACT = {
    "rte": (
        "sentence1: No Weapons of Mass Destruction Found in Iraq Yet. "
        "sentence2: Weapons of Mass Destruction Found in Iraq.",
        "not_entailment",
    ),
    "cb": (
        "premise: It was a complex language. Not written down but handed down. One might say it "
        "was peeled down. hypothesis: the language was peeled down",
        "entailment",
    ),
    "wic": (
        "sentence1: This violinist is as good as Juilliard-trained violinists go. "
        "sentence2: How fast does your new car go? word: go",
        "False",
    ),
    "wsc": (
        "text: * Mark * told Pete many lies about himself, which Pete included in his book. "
        "# He # should have been more skeptical.",
        "False",
    ),
    "stsb": (
        "sentence1: the russian foreign ministry stated that russia has not suspended dialogue. "
        "sentence2: russian officials stated that russia will not reconsider the suspension.",
        "2.6",
    ),
    "copa": (
        "premise: My body cast a shadow over the grass. choice1: The sun was rising. "
        "choice2: The grass was cut.",
        "choice1",
    ),
    "scitail": (
        "premise: A water molecule is made up of one oxygen atom and two hydrogen atoms. "
        "hypothesis: 2 hydrogen, 1 oxygen atoms combine to make up a molecule of water.",
        "entailment",
    ),
    "yelp_polarity": (
        "sentence: this was a great experience ! service by tj ( also known as jt ) was fabulous "
        "! ! salad was great and prices were very reasonable. will definitely come here again "
        "when back at the airport !",
        "1",
    ),
    "mpqa": ("text: were supporting", "positive"),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_text_of_a_real_row(shared_data, name):
    folder = shared_data / TASKS[name].folder
    row = json.loads((folder / "train.jsonl").read_text(encoding="utf-8").split("\n", 1)[0])
    example = TASKS[name].format(row)
    assert (example.source, example.target) == EXACT[name]
