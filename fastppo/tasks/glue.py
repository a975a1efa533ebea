"""The tasks of GLUE but CoLA (Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform", ICLR 2019).

Label ids are those of the hub's data sets. Where GLUE's own files name columns otherwise, ``aliases`` says how.
"""

from fastppo.tasks.task import Task
from fastppo.tasks.wording import prompts

GLUE = "nyu-mll/glue"

NLI = ("entailment", "neutral", "contradiction")
NLI_QUESTION = "Take the premise as true. Decide what follows for the hypothesis."
NLI_ANSWERS = (
    "entailment if the hypothesis must then be true, contradiction if it cannot be true, neutral if it may be either"
)
NLI_INPUTS = "Premise: {premise}\nHypothesis: {hypothesis}"
NLI_COLUMNS = {"premise": ("sentence1",), "hypothesis": ("sentence2",), "label": ("gold_label",)}

ENTAILS_QUESTION = "Take the premise as true. Decide whether the hypothesis then has to be true as well."
ENTAILS_ANSWERS = "yes if it has to be true, no if that does not follow"

SST2 = Task(
    **prompts(
        "The text is from a film review. Decide whether what it says about the film is good or bad.",
        "positive if it is good, negative if it is bad",
        "Text: {sentence}",
        "Opinion",
    ),
    name="sst2",
    slots=("sentence",),
    labels=("negative", "positive"),
    label_names=("negative", "positive"),
    hub=(GLUE, "sst2"),
)

MRPC = Task(
    **prompts(
        "Decide whether two sentences from the news tell the same.",
        "yes if they mean the same, no if one says something else",
        "First sentence: {sentence1}\nSecond sentence: {sentence2}",
        "The same",
    ),
    name="mrpc",
    slots=("sentence1", "sentence2"),
    labels=("no", "yes"),
    label_names=("not_equivalent", "equivalent"),
    metrics=("f1", "accuracy"),
    aliases={"sentence1": ("#1 string",), "sentence2": ("#2 string",), "label": ("quality",)},
    hub=(GLUE, "mrpc"),
)

QQP = Task(
    **prompts(
        "Two users of a forum each asked a question. Decide whether they want to know the same thing.",
        "yes if one answer would serve both, no if not",
        "First question: {question1}\nSecond question: {question2}",
        "The same",
    ),
    name="qqp",
    slots=("question1", "question2"),
    labels=("no", "yes"),
    label_names=("not_duplicate", "duplicate"),
    metrics=("f1", "accuracy"),
    aliases={"label": ("is_duplicate",), "index": ("id",)},
    tsv_columns=("id", "qid1", "qid2", "question1", "question2", "label"),
    drops_damaged=True,
    hub=(GLUE, "qqp"),
)

STSB = Task(
    **prompts(
        "Say how close two sentences are in meaning.",
        "from 0.0 (they have nothing in common) to 5.0 (they mean exactly the same)",
        "First sentence: {sentence1}\nSecond sentence: {sentence2}",
        "Closeness",
        one="a number",
    ),
    name="stsb",
    slots=("sentence1", "sentence2"),
    span=(0.0, 5.0),
    metrics=("spearman", "pearson"),
    aliases={"label": ("score",)},
    tsv_columns=("genre", "filename", "year", "index", "label", "sentence1", "sentence2"),
    tsv_extra=2,  # some rows of the original release name their two sources
    files={"train": ("sts-train",), "dev": ("sts-dev",)},
    hub=(GLUE, "stsb"),
)

MNLI = Task(
    **prompts(
        NLI_QUESTION,
        NLI_ANSWERS,
        NLI_INPUTS,
        "Relation",
    ),
    name="mnli",
    slots=("premise", "hypothesis"),
    labels=NLI,
    label_names=NLI,
    metrics=("accuracy", "accuracy_matched", "accuracy_mismatched"),
    aliases=NLI_COLUMNS,
    sections=("matched", "mismatched"),
    hub=(GLUE, "mnli"),
)

QNLI = Task(
    **prompts(
        "Decide whether the sentence holds the answer to the question.",
        "yes if the answer can be read there, no if not",
        "Question: {question}\nSentence: {sentence}",
        "Answered",
    ),
    name="qnli",
    slots=("question", "sentence"),
    labels=("yes", "no"),
    label_names=("entailment", "not_entailment"),
    hub=(GLUE, "qnli"),
)

RTE = Task(
    **prompts(
        ENTAILS_QUESTION,
        ENTAILS_ANSWERS,
        NLI_INPUTS,
        "Follows",
    ),
    name="rte",
    slots=("premise", "hypothesis"),
    labels=("yes", "no"),
    label_names=("entailment", "not_entailment"),
    aliases=NLI_COLUMNS,  # GLUE's form, and SuperGLUE's
    hub=(GLUE, "rte"),
)

WNLI = Task(
    **prompts(
        "The statement is about someone or something that the text refers to with a pronoun. Take the text as true, and decide "
        "whether the statement then is true.",
        "yes if it is, no if it is not",
        "Text: {premise}\nStatement: {hypothesis}",
        "True",
    ),
    name="wnli",
    slots=("premise", "hypothesis"),
    labels=("no", "yes"),
    label_names=("not_entailment", "entailment"),
    aliases=NLI_COLUMNS,
    hub=(GLUE, "wnli"),
)

AX = Task(
    **prompts(
        NLI_QUESTION,
        NLI_ANSWERS,
        NLI_INPUTS,
        "Relation",
    ),
    name="ax",
    slots=("premise", "hypothesis"),
    labels=NLI,
    label_names=NLI,
    metrics=("mcc",),
    aliases=NLI_COLUMNS,
    files={"dev": ("diagnostic-full", "diagnostic", "test"), "test": ("diagnostic",)},
    train_on="mnli",
    hub=(GLUE, "ax"),
)

TASKS: tuple[Task, ...] = (SST2, MRPC, QQP, STSB, MNLI, QNLI, RTE, WNLI, AX)
