"""The values that flow through an iteration: prompts with sampled answers, then packed and scored micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from fastppo.batch.buckets import Padded, pad_tree
from fastppo.batch.token_tree import TokenTree, build_tree, common_prefix, cut_by_tokens


@dataclass(frozen=True)
class Sample:
    """One sampled answer.

    prompt: index of its prompt. tokens: what was sampled, the end token included if it came. logprobs: of those tokens under
    the sampler's full distribution at its temperature. finish: ``eos``, ``stop`` (a stop string) or ``length``. text: the
    answer without the end token or stop string. mass: where nothing but answers could be drawn, the product over the tokens of
    the probability of all that might have followed; p / q of the policy and of what is drawn from, so its mean over the samples
    is the probability with which the policy by itself gives an answer.
    """

    prompt: int
    tokens: list[int]
    logprobs: list[float]
    finish: str
    text: str
    mass: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """Prompts (token ids) and their samples; the K samples of a prompt stand together, prompts in order."""

    prompts: list[list[int]]
    samples: list[Sample]


@dataclass
class MicroBatch:
    """One packed forward's worth of samples, and what is known of its actions (tensors [A], fp32; of padding 0).

    samples: indices into the rollout, in the tree's order of sequences.
    states: hidden states with their graph, the policy's and the critic's, where the next step's forward is done already.
    padded: the tree in a bucket's shape, where it is computed so.
    """

    tree: TokenTree
    samples: list[int]
    known: dict[str, Tensor] = field(default_factory=dict)
    states: tuple[Tensor, Tensor] | None = None
    padded: Padded | None = None

    @property
    def computed(self) -> TokenTree:
        """What the model runs: ``tree``, or that with padding behind all that is real."""
        return self.tree if self.padded is None else self.padded.tree

    @property
    def mask(self) -> Tensor | None:
        """[A] bool, which actions of ``computed`` are real; None: all."""
        return None if self.padded is None else self.padded.mask

    def pad(self) -> None:
        """Compute in a bucket's shape from now on. What is known is padded by ``pad_known``."""
        self.padded = pad_tree(self.tree)

    def pad_known(self) -> None:
        actions = self.computed.n_actions
        self.known = {name: pad(x, (0, actions - len(x))) for name, x in self.known.items()}

    def cut(self, budget: int, *, padded: bool) -> list[MicroBatch]:
        """Pieces of at most ``budget`` tokens, or of one sample, with what is known of each.

        Unlike ``pack`` this divides the answers of one prompt too, each piece then computes the prompt again: for a budget
        that has to be kept.
        """
        count, tree, first = len(self.samples), self.tree, 0
        if count == 1 or (tree.padded_tokens if padded else tree.n_tokens) <= budget:
            return [self]
        ends, targets = tree.cu_actions.tolist(), tree.action_targets.tolist()
        token_ids, pieces = tree.token_ids.cpu().numpy(), []
        for last in (count // 2, count):
            members = range(first, last)
            # The last token of an answer is only a target, so the tree's path lacks it.
            paths = [path[path >= 0] for path in tree.paths[first:last]]
            sequences = [[*token_ids[path].tolist(), targets[ends[i + 1] - 1]] for i, path in zip(members, paths, strict=True)]
            starts = [len(sequence) - (ends[i + 1] - ends[i]) for i, sequence in zip(members, sequences, strict=True)]
            known = {name: x[ends[first] : ends[last]] for name, x in self.known.items()}
            half = MicroBatch(build_tree(sequences, starts, device=tree.token_ids.device), self.samples[first:last], known)
            pieces += half.cut(budget, padded=padded)
            first = last
        return pieces


@dataclass
class MiniBatch:
    """What one optimizer step sees: micro-batches whose gradients add up."""

    parts: list[MicroBatch]

    @property
    def n_actions(self) -> int:
        return sum(part.tree.n_actions for part in self.parts)


def pack(
    prompts: list[list[int]], answers: list[tuple[int, list[int]]], *, budget: int, padded: bool, device: object
) -> list[MicroBatch]:
    """Pack answers into micro-batches of at most ``budget`` tokens; a prompt's answers stay together where they stand so.

    Args:
        prompts: token ids.
        answers: (prompt index, token ids of the answer); answers of one prompt stand together.
        budget: tokens of the tree per micro-batch; where ``padded``, tokens of the padded batch.
        device: of the tensors.
    """
    groups: list[list[int]] = []
    for i, (prompt, _) in enumerate(answers):
        if groups and answers[groups[-1][0]][0] == prompt:
            groups[-1].append(i)
        else:
            groups.append([i])
    shared = 0 if padded else common_prefix([prompts[answers[g[0]][0]] for g in groups])
    longest = max(len(prompts[p]) + len(a) for p, a in answers)
    sizes = [
        len(group) * longest
        if padded
        else len(prompts[answers[group[0]][0]]) - shared + sum(len(answers[i][1]) - 1 for i in group)
        for group in groups
    ]
    parts = []
    for batch in cut_by_tokens(sizes, shared, budget):
        members = [i for g in batch for i in groups[g]]
        sequences = [prompts[answers[i][0]] + answers[i][1] for i in members]
        tree = build_tree(sequences, [len(prompts[answers[i][0]]) for i in members], device=device)  # type: ignore[arg-type]
        parts.append(MicroBatch(tree, members))
    return parts


def pack_rollout(
    rollout: Rollout, *, minibatches: int, budget: int, padded: bool, device: object, rng: np.random.Generator
) -> list[MiniBatch]:
    """Divide a rollout's prompts at random into mini-batches and pack each.

    The division holds for all epochs of the iteration, so that old, reference and new log-probs come from the very same
    trees (only then is the first ratio exactly 1) and trees are built once.
    """
    order = rng.permutation(len(rollout.prompts))
    by_prompt: dict[int, list[int]] = {}
    for i, sample in enumerate(rollout.samples):
        by_prompt.setdefault(sample.prompt, []).append(i)
    result = []
    for chosen in np.array_split(order, minibatches):
        members = [i for p in chosen.tolist() for i in by_prompt[p]]
        answers = [(rollout.samples[i].prompt, rollout.samples[i].tokens) for i in members]
        parts = pack(rollout.prompts, answers, budget=budget, padded=padded, device=device)
        for part in parts:
            part.samples = [members[i] for i in part.samples]
        result.append(MiniBatch(parts))
    return result
