"""Plain torch modules that the tests' flows are made of."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from chatlearn import BaseModule


class Sampler(BaseModule):
    """Answers a number with its double; says which replica did, and how many rows it had."""

    def setup(self):
        torch.manual_seed(100 + self.replica_id)
        self.model = torch.nn.Linear(3, 2)

    def forward_step(self, data):
        count = len(data["prompt"])
        return {
            "prompt": data["prompt"],
            "sample": [row_id.sample for row_id in self.row_ids],
            "answer": [2 * int(x) for x in data["prompt"]],
            "weight": [self.model.weight.sum().item()] * count,
            "replica": [self.replica_id] * count,
            "rows": [count] * count,
        }

    eval_step = forward_step


class Scorer(BaseModule):
    """Scores an answer: 1 where it belongs to its prompt, whichever way the two came."""

    def forward_step(self, data):
        rewards = [
            float(int(answer) == 2 * int(prompt))
            for answer, prompt in zip(data["answer"], data["prompt"], strict=True)
        ]
        return {
            "prompt": data["prompt"],
            "answer": data["answer"],
            "rewards": torch.tensor(rewards),
            "scorer": [self.replica_id] * len(rewards),
        }

    eval_step = forward_step


class Doubler(BaseModule):
    """Adds a column of its own to nothing: gives `checked`, the prompt times three."""

    def forward_step(self, data):
        return {"checked": [3 * int(x) for x in data["prompt"]]}


class Trainer(BaseModule):
    """Adds the mean of its prompts to its weights, and notes every batch in the run folder."""

    def setup(self):
        torch.manual_seed(7)
        self.model = torch.nn.Linear(3, 2)

    def train_step(self, data, iteration):
        rows = [int(x) for part in data for x in part["prompt"]]
        sums = torch.tensor([float(sum(rows)), float(len(rows))])
        if self.data_parallel_group is not None:
            dist.all_reduce(sums, group=self.data_parallel_group)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(float(sums[0] / sums[1]))
        note = {
            "iteration": iteration,
            "ids": [[list(row_id) for row_id in part] for part in self.row_ids],
            "prompts": rows,
            "lane": self.data_parallel_rank,
        }
        with (self.run_dir / f"{self.name}.{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        return {"rows": len(rows)}


def read_notes(run_dir, name):
    """What every rank of a Trainer noted, by rank."""
    files = sorted(run_dir.glob(f"{name}.*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def trained_batches(run_dir, name):
    """The row ids of each global batch that a Trainer saw, in the order of its lanes."""
    by_rank = read_notes(run_dir, name)
    return [
        [tuple(i) for note in notes for part in note["ids"] for i in part]
        for notes in zip(*by_rank, strict=True)
    ]
