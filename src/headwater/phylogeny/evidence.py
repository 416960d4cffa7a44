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


import numpy as np
from headwater.native import kept_njit

@kept_njit(fastmath=True)
def jc_join(tips, tables, left, right, lengths, step, weights, out):
    n = tips.shape[0]
    P = tips.shape[1]
    for t in range(left.size):
        a = tips[left[t]] if left[t] < n else tables[t, left[t]-n]
        b = tips[right[t]] if right[t] < n else tables[t, right[t]-n]
        c = tables[t, step]
        u = np.float32(np.exp(-4.0/3.0*lengths[t,0])); v = np.float32(np.exp(-4.0/3.0*lengths[t,1]))
        total = 0.0
        for p in range(P):
            # partials normalised: mean over states = 1
            x0 = u*a[p,0]+(1-u); x1=u*a[p,1]+(1-u); x2=u*a[p,2]+(1-u); x3=u*a[p,3]+(1-u)
            y0 = x0*(v*b[p,0]+(1-v)); y1=x1*(v*b[p,1]+(1-v)); y2=x2*(v*b[p,2]+(1-v)); y3=x3*(v*b[p,3]+(1-v))
            m = np.float32(0.25)*(y0+y1+y2+y3)
            r = np.float32(1)/m
            c[p,0]=y0*r; c[p,1]=y1*r; c[p,2]=y2*r; c[p,3]=y3*r
            total += weights[p]*np.log(m)
        out[t] = total

class BayesGrown(Grown):
    def __init__(self, e, count):
        super().__init__(e, count)
        self.part = np.empty((count, e.n-1, e.tips.shape[1], 4), np.float32)
        self.loglik = torch.full((count,), e.base, dtype=torch.float64)
    def join(self, step, left, right, lengths, others):
        super().join(step, left, right, lengths, others)
        f = np.empty(len(left))
        jc_join(self.e.tips, self.part, left.numpy(), right.numpy(), lengths.numpy(), step, self.e.wn, f)
        self.loglik += torch.from_numpy(f)
        x = torch.from_numpy(self.part[:, step][:, self.e.keepn])
        return ((x - 1) * self.e.scale[:,None]).flatten(1)

class BayesEvidence(Evidence):
    has_lengths = True
    def __init__(self, masks, weights):
        masks = masks.clone(); masks[masks == 16] = 15
        allm, allw = torch.unique(masks.t(), dim=0, return_inverse=True)
        w = torch.zeros(len(allm)).index_add(0, allw, weights)
        masks = allm.t().contiguous()
        super().__init__(masks, w, 4)
        tips = torch.stack([(masks >> k) & 1 for k in range(4)], -1).float()
        m = tips.mean(-1, keepdim=True)
        self.tips = (tips / m).numpy().astype(np.float32)
        self.wn = w.numpy().astype(np.float64)
        self.base = float((m[...,0].double().log() * w.double()).sum())
        keep = (masks != masks[:1]).any(0)
        self.keepn = keep.numpy()
        self.scale = (w[keep] / w[keep].mean()).sqrt() * 0.3
        self.features = int(keep.sum()) * 4
        self.leaves = ((torch.from_numpy(self.tips)[:, keep] - 1) * self.scale[:, None]).flatten(1)
    def describe(self, sets):
        if not hasattr(self, 'scale'): return torch.zeros(len(sets), 1)
        return None
    def start(self, count): return BayesGrown(self, count)
    def log_likelihood(self, merges, lengths):
        g = self.start(len(merges))
        n = self.n
        g.leaf = None
        for t in range(n-1):
            f = np.empty(len(merges))
            jc_join(self.tips, g.part, merges[:, t,0].long().numpy(), merges[:, t,1].long().numpy(), lengths[:, t].contiguous().numpy(), t, self.wn, f)
            g.loglik += torch.from_numpy(f)
        return g.loglik
