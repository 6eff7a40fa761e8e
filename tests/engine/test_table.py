"""Rules of many requests as one: each row is treated as by its own rules alone, bit for bit, whoever sat there or sits beside it."""
from __future__ import annotations

import random

import torch

from ftops.engine.table import Table
from ftops.generation import rules
from ftops.generation.options import parse
from tests.engine.requests import WAYS, Letters

WORDS, ROWS = 120, 6
LONGER = [{"stop": [[1, 2, 3, 4, 5], [6], [7], [8], [9]], "bad_words": [[3, 4, 5, 6, 7, 8]]},
          {"eos_token_id": list(range(9)), "min_new_tokens": 3}, {"logit_bias": torch.linspace(-1, 1, WORDS)[None]},
          {"sequence_bias": {(1, 2): 1.0, (1, 3): 2.0, (4, 5, 6): -3.0, (9,): 1.0}}]


def test_rows_do_not_know_one_another():
    """Requests come, draw, and leave in any order, with longer sequences than any before."""
    chance = random.Random(0)
    table, lone = Table(ROWS, WORDS, torch.device("cpu")), {}
    ids, filled, drawn = (torch.zeros(shape, dtype=torch.int64) for shape in ((ROWS, 40), ROWS, ROWS))
    ways = [*WAYS, *LONGER]
    for turn in range(60):
        row = chance.randrange(ROWS)
        if row in lone and turn % 3 == 0 and len(lone) > 1:  # another takes its place
            source = chance.choice([one for one in lone if one != row])
            table.move([(source, row)], torch.tensor([source]), torch.tensor([row]))
            for tensor in (ids, filled, drawn):
                tensor[row] = tensor[source]
            lone[row] = {name: value.clone() for name, value in lone[source].items()}
        else:
            options = parse({**chance.choice(ways[: 5 + turn // 3]), "tokenizer": Letters(), "seed": turn, "max_new_tokens": 9}, 1, WORDS)
            length = chance.randrange(1, 20)
            ids[row, :length], filled[row], drawn[row] = torch.randint(12, (length,)), length, 0
            given = rules.build(options, ids[row : row + 1, :length], torch.ones((1, length), dtype=torch.bool), WORDS)
            table.put(row, given)
            lone[row] = {name: value.clone() for name, value in given.items()}
        names = frozenset().union(*lone.values())
        logits, given = torch.randn(ROWS, WORDS) * 3, table.rows(names, ROWS)
        scores = rules.penalised(given, logits, ids, filled, drawn)
        tokens = rules.draw(given, scores, drawn)
        rules.remember(given, tokens)
        ids.scatter_(1, filled.clamp(max=39)[:, None], tokens[:, None])
        filled, drawn = (filled + 1).clamp(max=39), drawn + 1
        ended = rules.ended(given, tokens, ids, filled, drawn)
        for one, own in lone.items():
            at = slice(one, one + 1)
            before = ids[at].clone()
            assert torch.equal(rules.penalised(own, logits[at], before, filled[at] - 1, drawn[at] - 1).float(), scores[at])
            assert rules.draw(own, scores[at], drawn[at] - 1).tolist() == tokens[at].tolist()
            rules.remember(own, tokens[at])
            assert rules.ended(own, tokens[at], ids[at], filled[at], drawn[at]).tolist() == ended[at].tolist()
