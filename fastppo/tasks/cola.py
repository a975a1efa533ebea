"""CoLA: is a sentence acceptable English? (Warstadt et al., "Neural Network Acceptability Judgments", TACL 2019)"""

from fastppo.tasks.task import BUILT_IN, Task
from fastppo.tasks.wording import prompts

COLA = Task(
    **prompts(
        """Decide whether a sentence is acceptable English.
A sentence is acceptable if a native speaker could say it: the word order, the agreement, the forms of the words and \
what each verb needs are all right.""",
        "yes if the sentence is acceptable, no if it is not",
        "Sentence: {sentence}",
        "Acceptable",
    ),
    name="cola",
    slots=("sentence",),
    labels=("no", "yes"),
    label_names=("unacceptable", "acceptable"),
    metrics=("mcc",),
    tsv_columns=("source", "label", "mark", "sentence"),
    hub=("nyu-mll/glue", "cola"),
    data=BUILT_IN,
)
