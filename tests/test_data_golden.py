"""Every task's text, written by hand from the published conventions, beside a made-up row.

Nothing here was produced by running the code. The rows have all columns of the hub's schema. A
case is (row, source, target as name, target as index); `REFERENCES` has the further answers. No
convention is published for options with letters: theirs is that of `multiple_choice.py`.
"""

import pytest

from pemt_fast.data import SOURCE_TASKS, TARGET_TASKS, TASKS

NLI_ROW = {"premise": "A dog runs.", "hypothesis": "An animal moves.", "idx": 7}
NLI = "premise: A dog runs. hypothesis: An animal moves."
PAIR_ROW = {"sentence1": "Rain fell.", "sentence2": "It was wet.", "idx": 7}
PAIR = "sentence1: Rain fell. sentence2: It was wet."
CONTEXT = "In 1969, NASA's crew (three men) landed."

# What SQuAD and the four sets of MRQA share: every mark of punctuation stands alone.
READ = (
    "question: Who landed , in 1969 ? "
    "context: In 1969 , NASA ' s crew ( three men ) landed ."
)  # fmt: skip
MRQA_ROW = {
    "context": CONTEXT,
    "question": "Who landed, in 1969?",
    "answers": ["NASA's crew", "three men"],
    "key": "q7",
    "labels": [{"start": [9], "end": [19]}],
}


def record_row(passage, **changes):
    return {
        "passage": passage,
        "query": "@placeholder won the cup",
        "entities": ["Ann Lee", "Bo", "Oslo"],
        "entity_spans": {"text": ["Bo"], "start": [4], "end": [6]},
        "answers": ["Bo", "Ann Lee"],
        "idx": {"passage": 1, "query": 2},
        **changes,
    }


IN_RECORD = "record query: @placeholder won the cup entities: Ann Lee, Bo, Oslo passage: "


def wsc_row(text, noun, pronoun, label=1):
    """The two spans as (word number, text)."""
    return {
        "text": text,
        "span1_index": noun[0], "span1_text": noun[1],
        "span2_index": pronoun[0], "span2_text": pronoun[1],
        "idx": 7, "label": label,
    }  # fmt: skip


def multirc_row(paragraph, label):
    return {
        "paragraph": paragraph, "question": "Who <b>left</b>?", "answer": "Bo<br>",
        "idx": {"paragraph": 3, "question": 5, "answer": 8}, "label": label,
    }  # fmt: skip


GOLDEN = {
    # --- GLUE: the columns under their names, the class names in the hub's order
    "sst2": [
        ({"sentence": "a joy to watch ", "label": 1, "idx": 7},
         "sentence: a joy to watch", "positive", "1"),
        ({"sentence": "dull .", "label": 0, "idx": 8}, "sentence: dull .", "negative", "0"),
    ],
    "cola": [
        ({"sentence": "They drank dry the pub.", "label": 0, "idx": 7},
         "sentence: They drank dry the pub.", "unacceptable", "0"),
        ({"sentence": "They drank.", "label": 1, "idx": 8},
         "sentence: They drank.", "acceptable", "1"),
    ],
    "mnli": [
        ({**NLI_ROW, "label": 0}, NLI, "entailment", "0"),
        ({**NLI_ROW, "label": 1}, NLI, "neutral", "1"),
        ({**NLI_ROW, "label": 2}, NLI, "contradiction", "2"),
    ],
    "qnli": [
        ({"question": "Who sang?", "sentence": "Bo sang.", "label": 0, "idx": 7},
         "question: Who sang? sentence: Bo sang.", "entailment", "0"),
        ({"question": "Who sang?", "sentence": "It rained.", "label": 1, "idx": 8},
         "question: Who sang? sentence: It rained.", "not_entailment", "1"),
    ],
    "qqp": [
        ({"question1": "How old is Oslo?", "question2": "What is Oslo's age?",
          "label": 1, "idx": 7},
         "question1: How old is Oslo? question2: What is Oslo's age?", "duplicate", "1"),
        ({"question1": "Why?", "question2": "How?", "label": 0, "idx": 8},
         "question1: Why? question2: How?", "not_duplicate", "0"),
    ],
    "rte": [
        ({**PAIR_ROW, "label": 0}, PAIR, "entailment", "0"),
        ({**PAIR_ROW, "label": 1}, PAIR, "not_entailment", "1"),
    ],
    "wnli": [
        ({**PAIR_ROW, "label": 0}, PAIR, "not_entailment", "0"),
        ({**PAIR_ROW, "label": 1}, PAIR, "entailment", "1"),
    ],
    "mrpc": [
        ({**PAIR_ROW, "label": 0}, PAIR, "not_equivalent", "0"),
        ({**PAIR_ROW, "label": 1}, PAIR, "equivalent", "1"),
    ],
    # To a tenth, not to a fifth; half a tenth goes to the even digit, as numpy rounds.
    "stsb": [
        ({**PAIR_ROW, "label": 0.0}, PAIR, "0.0", "0.0"),
        ({**PAIR_ROW, "label": 3.5}, PAIR, "3.5", "3.5"),
        ({**PAIR_ROW, "label": 3.25}, PAIR, "3.2", "3.2"),
        ({**PAIR_ROW, "label": 3.75}, PAIR, "3.8", "3.8"),
        ({**PAIR_ROW, "label": 4.333}, PAIR, "4.3", "4.3"),
        ({**PAIR_ROW, "label": 5}, PAIR, "5.0", "5.0"),
    ],
    # --- SuperGLUE
    "cb": [
        ({**NLI_ROW, "label": 0}, NLI, "entailment", "0"),
        ({**NLI_ROW, "label": 1}, NLI, "contradiction", "1"),
        ({**NLI_ROW, "label": 2}, NLI, "neutral", "2"),
    ],
    "copa": [
        ({"premise": "I ran.", "choice1": "I was late.", "choice2": "I was early.",
          "question": "cause", "idx": 7, "label": 0},
         "premise: I ran. choice1: I was late. choice2: I was early.", "choice1", "0"),
        ({"premise": "I ran.", "choice1": "I slept.", "choice2": "I sweated.",
          "question": "effect", "idx": 8, "label": 1},
         "premise: I ran. choice1: I slept. choice2: I sweated.", "choice2", "1"),
    ],
    "boolq": [
        ({"question": "is oslo big", "passage": "Oslo -- Oslo is a city.", "idx": 7, "label": 1},
         "question: is oslo big passage: Oslo -- Oslo is a city.", "True", "1"),
        ({"question": "is it", "passage": "No.", "idx": 8, "label": 0},
         "question: is it passage: No.", "False", "0"),
    ],
    "multirc": [
        (multirc_row("<b>Sent 1: </b>Bo left.<br><b>Sent 2: </b>Ann stayed.<br>", 1),
         "question: Who left? answer: Bo paragraph: Sent 1: Bo left. Sent 2: Ann stayed.",
         "True", "1"),
        # Only these two tags are markup; a smaller-than sign is text.
        (multirc_row("1 < 2 <i>here</i>", 0),
         "question: Who left? answer: Bo paragraph: 1 < 2 <i>here</i>", "False", "0"),
    ],
    "wic": [
        ({"word": "bank", "sentence1": "A river bank.", "sentence2": "The bank lent money.",
          "start1": 8, "start2": 4, "end1": 12, "end2": 8, "idx": 7, "label": 0},
         "sentence1: A river bank. sentence2: The bank lent money. word: bank", "False", "0"),
        ({"word": "run", "sentence1": "I run.", "sentence2": "They run.",
          "start1": 2, "start2": 5, "end1": 5, "end2": 8, "idx": 8, "label": 1},
         "sentence1: I run. sentence2: They run. word: run", "True", "1"),
    ],
    "wsc": [
        (wsc_row("Mark told Pete that he won.", (0, "Mark"), (4, "he")),
         "text: * Mark * told Pete that # he # won.", "True", "1"),
        # The pronoun first, a noun of two words, punctuation that stays outside the mark.
        (wsc_row("When he left, the old man, Bo, sang.", (3, "the old man"), (1, "he"), 0),
         "text: When # he # left, * the old man *, Bo, sang.", "False", "0"),
        # The same pronoun earlier in the text is not the one.
        (wsc_row("He saw Bo and he waved.", (2, "Bo"), (4, "he")),
         "text: He saw * Bo * and # he # waved.", "True", "1"),
        # A number that points at another word: no mark, as in the published preparation.
        (wsc_row("Mark told Pete that he won.", (0, "Mark"), (3, "he")),
         "text: * Mark * told Pete that he won.", "True", "1"),
    ],
    "record": [
        (record_row("Bo met Ann Lee.\n@highlight\nIt rained"),
         f"{IN_RECORD}Bo met Ann Lee. It rained", "Bo", "Bo"),
        # A line without a closing mark gets one, one that ends in any of . ? ! " ' does not.
        (record_row("Bo met Ann\n@highlight\nIt rained!\n@highlight\nIn \"Oslo\"\n@highlight\nEnd"),
         f"{IN_RECORD}Bo met Ann. It rained! In \"Oslo\" End", "Bo", "Bo"),
    ],
    # --- extractive question answering: the first answer, all of them are accepted
    "squad": [
        ({"id": "7", "title": "Moon", "context": CONTEXT, "question": "Who landed, in 1969?",
          "answers": {"text": ["NASA's crew", "three men"], "answer_start": [9, 22]}},
         READ, "NASA ' s crew", "NASA ' s crew"),
        # Underscores, letters with accents and digits belong to words.
        ({"id": "8", "title": "x", "context": "Café_Zoë costs $5.", "question": "Where?",
          "answers": {"text": ["Café_Zoë"], "answer_start": [0]}},
         "question: Where ? context: Café_Zoë costs $ 5 .", "Café_Zoë", "Café_Zoë"),
    ],
    "nq": [(MRQA_ROW, READ, "NASA ' s crew", "NASA ' s crew")],
    "hotpotqa": [(MRQA_ROW, READ, "NASA ' s crew", "NASA ' s crew")],
    "newsqa": [(MRQA_ROW, READ, "NASA ' s crew", "NASA ' s crew")],
    "searchqa": [
        ({**MRQA_ROW, "context": "[DOC] [TLE] Moon", "answers": ["moon"]},
         "question: Who landed , in 1969 ? context: [ DOC ] [ TLE ] Moon", "moon", "moon"),
    ],
    # --- further pairs: SciTail's label is text, PAWS keeps digits
    "scitail": [
        ({"sentence1": "Ice melts.", "sentence2": "Ice turns to water.",
          "gold_label": "entailment", "annotator_labels": ["entailment"]},
         "premise: Ice melts. hypothesis: Ice turns to water.", "entailment", "0"),
        ({"sentence1": "Ice.", "sentence2": "Fire.", "gold_label": "neutral"},
         "premise: Ice. hypothesis: Fire.", "neutral", "1"),
    ],
    "snli": [
        ({"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 0},
         NLI, "entailment", "0"),
        ({"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 2},
         NLI, "contradiction", "2"),
    ],
    "paws": [
        ({"id": 7, "sentence1": "Rain fell.", "sentence2": "It was wet.", "label": 0},
         PAIR, "0", "0"),
        ({"id": 8, "sentence1": "Rain fell.", "sentence2": "It was wet.", "label": 1},
         PAIR, "1", "1"),
    ],
    # --- single texts: Yelp keeps digits and says `sentence:`
    "yelp_polarity": [
        ({"text": "Great tacos!", "label": 1}, "sentence: Great tacos!", "1", "1"),
        ({"text": "Cold.\nRude.", "label": 0}, "sentence: Cold.\nRude.", "0", "0"),
    ],
    "ag_news": [
        ({"text": "Oil falls", "label": 0}, "text: Oil falls", "World", "0"),
        ({"text": "Cup won", "label": 1}, "text: Cup won", "Sports", "1"),
        ({"text": "Oil falls", "label": 2}, "text: Oil falls", "Business", "2"),
        ({"text": "New chip", "label": 3}, "text: New chip", "Sci/Tech", "3"),
    ],
    "trec": [
        ({"text": "What is NASA ?", "coarse_label": 0, "fine_label": 1},
         "text: What is NASA ?", "ABBR", "0"),
        ({"text": "Who sang ?", "coarse_label": 3, "fine_label": 29},
         "text: Who sang ?", "HUM", "3"),
        ({"text": "How many ?", "coarse_label": 5, "fine_label": 38},
         "text: How many ?", "NUM", "5"),
    ],
    "subj": [
        ({"text": "he dies .", "label": 0, "label_text": "objective"},
         "text: he dies .", "objective", "0"),
        ({"text": "i loved it .", "label": 1, "label_text": "subjective"},
         "text: i loved it .", "subjective", "1"),
    ],
    # The hub's class names are abbreviations for these two, words for the next three.
    "imdb": [
        ({"text": "Bad.<br /><br />Very.", "label": 0},
         "text: Bad.<br /><br />Very.", "neg", "0"),
        ({"text": "Good.", "label": 1}, "text: Good.", "pos", "1"),
    ],
    "rotten_tomatoes": [
        ({"text": "dull and long .", "label": 0}, "text: dull and long .", "neg", "0"),
        ({"text": "a delight .", "label": 1}, "text: a delight .", "pos", "1"),
    ],
    "sst5": [
        ({"text": "a mess .", "label": 0, "label_text": "very negative"},
         "text: a mess .", "very negative", "0"),
        ({"text": "slow .", "label": 1, "label_text": "negative"}, "text: slow .", "negative", "1"),
        ({"text": "it ends .", "label": 2, "label_text": "neutral"},
         "text: it ends .", "neutral", "2"),
        ({"text": "nice .", "label": 3, "label_text": "positive"},
         "text: nice .", "positive", "3"),
        ({"text": "superb .", "label": 4, "label_text": "very positive"},
         "text: superb .", "very positive", "4"),
    ],
    "cr": [
        ({"text": "it broke .", "label": 0, "label_text": "negative"},
         "text: it broke .", "negative", "0"),
        ({"text": "it lasts .", "label": 1, "label_text": "positive"},
         "text: it lasts .", "positive", "1"),
    ],
    "mpqa": [
        ({"text": "threatened", "label": 0, "label_text": "negative"},
         "text: threatened", "negative", "0"),
        ({"text": "were supporting", "label": 1, "label_text": "positive"},
         "text: were supporting", "positive", "1"),
    ],
    # --- the text of the chosen option, its number from zero
    "winogrande": [
        ({"sentence": "Bo beat Ann, so _ sang.", "option1": "Bo", "option2": "Ann", "answer": "1"},
         "sentence: Bo beat Ann, so _ sang. option1: Bo option2: Ann", "Bo", "0"),
        ({"sentence": "Bo beat Ann, so _ wept.", "option1": "Bo", "option2": "Ann", "answer": "2"},
         "sentence: Bo beat Ann, so _ wept. option1: Bo option2: Ann", "Ann", "1"),
    ],
    # --- options with letters: the text of the right one, or its letter
    "piqa": [
        # Whole solutions: an earlier template took the first character of each.
        ({"goal": "Dry a wet book.", "sol1": "Stand it open.", "sol2": "Boil it.", "label": 0},
         "question: Dry a wet book. A: Stand it open. B: Boil it.", "Stand it open.", "A"),
        ({"goal": "Cut bread", "sol1": "Use a spoon", "sol2": "Use a knife", "label": 1},
         "question: Cut bread A: Use a spoon B: Use a knife", "Use a knife", "B"),
    ],
    # The label is a text that counts from one.
    "siqa": [
        ({"context": "Bo helped Ann.", "question": "How is Ann?", "answerA": "cross",
          "answerB": "grateful", "answerC": "asleep", "label": "2"},
         "context: Bo helped Ann. question: How is Ann? A: cross B: grateful C: asleep",
         "grateful", "B"),
        ({"context": "Bo ran.", "question": "Why?", "answerA": "a", "answerB": "b",
          "answerC": "to win", "label": "3"},
         "context: Bo ran. question: Why? A: a B: b C: to win", "to win", "C"),
    ],
    # The label is a text that counts from zero.
    "hellaswag": [
        ({"ind": 4, "activity_label": "Baking", "ctx_a": "Bo mixes flour.", "ctx_b": "he",
          "ctx": "Bo mixes flour. he", "endings": ["sings.", "adds eggs.", "swims.", "flies."],
          "source_id": "x~v_1", "split": "train", "split_type": "indomain", "label": "1"},
         "context: Bo mixes flour. he A: sings. B: adds eggs. C: swims. D: flies.",
         "adds eggs.", "B"),
    ],
    "arc_easy": [
        ({"id": "q1", "question": "What melts?", "answerKey": "C",
          "choices": {"text": ["rock", "sand", "ice", "air"], "label": ["A", "B", "C", "D"]}},
         "question: What melts? A: rock B: sand C: ice D: air", "ice", "C"),
        # Some rows count with digits: the source shows letters all the same.
        ({"id": "q2", "question": "What melts?", "answerKey": "2",
          "choices": {"text": ["rock", "ice", "sand"], "label": ["1", "2", "3"]}},
         "question: What melts? A: rock B: ice C: sand", "ice", "B"),
    ],
    "arc_challenge": [
        ({"id": "q1", "question": "Which?", "answerKey": "E",
          "choices": {"text": ["a", "b", "c", "d", "all"], "label": ["A", "B", "C", "D", "E"]}},
         "question: Which? A: a B: b C: c D: d E: all", "all", "E"),
    ],
    "openbookqa": [
        ({"id": "q1", "question_stem": "The sun is", "answerKey": "A",
          "choices": {"text": ["hot", "wet", "new", "near"], "label": ["A", "B", "C", "D"]}},
         "question: The sun is A: hot B: wet C: new D: near", "hot", "A"),
    ],
    # The hub's number stands for a letter; the subject is not shown.
    "mmlu": [
        ({"question": "What is 2 + 3?", "subject": "elementary_mathematics",
          "choices": ["4", "5", "6", "7"], "answer": 1},
         "question: What is 2 + 3? A: 4 B: 5 C: 6 D: 7", "5", "B"),
        ({"question": "Who?", "subject": "", "choices": ["A", "B", "both", "none"], "answer": 0},
         "question: Who? A: A B: B C: both D: none", "A", "A"),
    ],
}  # fmt: skip

# Where more than the target is accepted.
_CREW = ("NASA ' s crew", "three men")
REFERENCES = {
    **dict.fromkeys(("squad-0", "nq-0", "hotpotqa-0", "newsqa-0"), _CREW),
    **dict.fromkeys(("record-0", "record-1"), ("Bo", "Ann Lee")),
}
CASES = [
    pytest.param(name, *case, REFERENCES.get(f"{name}-{number}"), id=f"{name}-{number}")
    for name, cases in GOLDEN.items()
    for number, case in enumerate(cases)
]


def test_every_task_has_a_golden_text():
    assert set(GOLDEN) == set(TASKS)
    assert set(SOURCE_TASKS) | set(TARGET_TASKS) <= set(GOLDEN)


@pytest.mark.parametrize(("name", "row", "source", "target", "index", "references"), CASES)
def test_text_is_the_published_one(name, row, source, target, index, references):
    example = TASKS[name].format(row)
    assert (example.source, example.target) == (source, target)
    assert example.references == (references or (target,))


@pytest.mark.parametrize(("name", "row", "source", "target", "index", "references"), CASES)
def test_label_style_index_changes_the_target_only(name, row, source, target, index, references):
    example = TASKS[name].format(row, "index")
    assert (example.source, example.target) == (source, index)
    assert example.references == (references or (index,))


def test_record_writes_one_training_example_per_answer():
    row, source, _, _ = GOLDEN["record"][0]
    examples = TASKS["record"].format_for_training(row)
    assert [(e.source, e.target) for e in examples] == [(source, "Bo"), (source, "Ann Lee")]
    assert {e.references for e in examples} == {("Bo", "Ann Lee")}


def test_multirc_groups_the_answers_of_a_question():
    row, *_ = GOLDEN["multirc"][0]
    assert TASKS["multirc"].format(row).group == "3-5"
