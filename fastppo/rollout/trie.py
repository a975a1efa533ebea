"""Closed sets of answers as a trie of tokens: what may follow what a sample has so far (constrained decoding)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenTrie:
    """Nodes 0 to N - 1, of which answers begin at ``roots``; up to C tokens may follow a node. ``longest``: most tokens of an
    answer.

    It is looked up in tables on the device of the logits: a GPU computes on while the host does not know the node.

    Args:
        sets: of answers, token ids, each closed with one and the same end token of the model, so that an answer may be the
            beginning of another one's text. Answers of the i-th set begin at the node ``roots[i]``, those of the first at 0.
        device: of the logits and nodes.

    Raises:
        ValueError: no answer, or one that is empty, not closed like the others, closed in its middle or twice in its set.
    """

    def __init__(self, *sets: Sequence[Sequence[int]], device: torch.device | str = "cpu"):
        everything = [answer for answers in sets for answer in answers]
        ends = {token for answer in everything for token in answer[-1:]}
        closed = len(ends) == 1 and all(sets) and all(everything)
        if not closed or any(token in ends for answer in everything for token in answer[:-1]):
            raise ValueError(f"answers must end with one end token, which stands nowhere else in them, got {everything}")
        children: list[dict[int, int]] = []  # of each node, the node behind each token that may follow
        self.roots: list[int] = []
        for answers in sets:
            if len({tuple(answer) for answer in answers}) < len(answers):
                raise ValueError(f"answers must differ, got {answers}")
            self.roots.append(len(children))
            children.append({})
            for answer in answers:
                node = self.roots[-1]
                for token in answer[:-1]:
                    if token not in children[node]:
                        children[node][token] = len(children)
                        children.append({})
                    node = children[node][token]
                children[node][answer[-1]] = 0  # nothing is drawn there: the sample has ended
        self.longest = max(map(len, everything))
        width = max(map(len, children))
        padded = [[*of.items(), *[(0, 0)] * (width - len(of))] for of in children]
        self.token_NC, self.next_NC = torch.tensor(padded, device=device).unbind(2)
        self.is_padding_NC = torch.tensor([[c >= len(of) for c in range(width)] for of in children], device=device)

    def among(self, logits_BV: Tensor, nodes_B: Tensor) -> Tensor:
        """[B, C]: of each row, the logits of the tokens that may follow its node, -inf where there are fewer than C."""
        return logits_BV.gather(1, self.token_NC[nodes_B]).masked_fill_(self.is_padding_NC[nodes_B], -torch.inf)

    def follow(self, nodes_B: Tensor, choices_B: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens at these places of ``among``, and the nodes behind them, both [B] int64."""
        return self.token_NC[nodes_B, choices_B], self.next_NC[nodes_B, choices_B]
