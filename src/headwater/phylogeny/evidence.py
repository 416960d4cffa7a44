"""temporary torch version"""
from __future__ import annotations
import torch
from torch import Tensor

class Grown:
    def __init__(self, evidence, count):
        n = evidence.n
        self.e = evidence
        self.sets = torch.zeros(count, 2*n-1, evidence.masks.shape[1], dtype=torch.uint8)
        self.sets[:, :n] = evidence.masks
        self.changes = torch.zeros(count, 2*n-1, 2*n-1); self.comparable = torch.ones(count, 2*n-1, 2*n-1)
        self.changes[:, :n, :n] = evidence.leaf_changes
        self.comparable[:, :n, :n] = evidence.leaf_comparable
        self.here = torch.arange(count)

    def join(self, step, left, right, lengths, others):
        n = self.e.n
        a, b = self.sets[self.here, left], self.sets[self.here, right]
        both = a & b
        new = torch.where(both > 0, both, a | b)
        node = n + step
        self.sets[:, node] = new
        o = self.sets[self.here[:, None], others]
        c = ((o & new[:, None]) == 0).float() @ self.e.weights
        k = ((o != self.e.full) & (new[:, None] != self.e.full)).float() @ self.e.weights
        self.changes[self.here[:, None], node, others] = c
        self.changes[self.here[:, None], others, node] = c
        self.comparable[self.here[:, None], node, others] = k
        self.comparable[self.here[:, None], others, node] = k
        return self.e.describe(new)

class Evidence:
    has_lengths = False
    def __init__(self, masks, weights, planes):
        self.n = masks.shape[0]
        self.masks = masks; self.weights = weights; self.planes = planes; self.full = 15
        keep = (masks != masks[:1]).any(0)
        self.masks, self.weights = masks[:, keep], weights[keep]
        self.features = self.masks.shape[1] * planes
        self.leaves = self.describe(self.masks)
        a, b = self.masks[:, None], self.masks[None]
        self.leaf_changes = ((a & b) == 0).float() @ self.weights
        self.leaf_comparable = ((a != 15) & (b != 15)).float() @ self.weights
    def describe(self, sets):
        bits = torch.stack([(sets >> k) & 1 for k in range(self.planes)], -1).float()
        return (bits - 0.3).flatten(-2)
    def start(self, count):
        return Grown(self, count)
