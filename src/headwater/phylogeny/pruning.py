"""Felsenstein's pruning, float32, sixteen site patterns at once: the kernels of `felsenstein.py`.

Whole trees go through the patterns in chunks of which a tree's nodes stay in a core's cache. Every merge multiplies by
a power of two, which is exact, so that nothing underflows and logarithms are taken at the root alone. JC69 without
categories has kernels of its own: exp(-4/3 b) and a sum of four say what a matrix says.
"""

from __future__ import annotations

import math

import numpy as np

from headwater.native import kept_njit
from headwater.policies.registers import (
    LANES,
    add,
    broadcast,
    exponent,
    load,
    multiply,
    multiply_add,
    power_to_unit,
    reciprocal,
    store,
)

_CHUNK = 16 * LANES
_LOG_2 = math.log(2)


@kept_njit()
def _scratch(size):  # type: ignore[no-untyped-def]
    """Numbers that begin a cache line: registers across two of them take up to 1.7 times as long."""
    room = np.empty(size + LANES, dtype=np.float32)
    start = -room.ctypes.data % (4 * LANES) // 4
    return room[start : start + size]


@kept_njit()
def closed_form_trees(leaves, weights, common, merges, edges, frequencies, invariant):  # type: ignore[no-untyped-def]
    """Each node keeps as a fifth plane the sum of its four, which its parent needs."""
    n, _, patterns = leaves.shape
    size = 5 * _CHUNK
    nodes = _scratch((2 * n - 1) * size)
    powers = np.empty(_CHUNK, dtype=np.float32)
    roots = np.empty(_CHUNK, dtype=np.float32)
    logs = np.zeros(len(merges))
    for start in range(0, patterns, _CHUNK):
        chunk = min(_CHUNK, patterns - start)
        for leaf in range(n):
            for w in range(chunk):
                whole = np.float32(0)
                for state in range(4):
                    nodes[leaf * size + state * _CHUNK + w] = leaves[leaf, state, start + w]
                    whole += leaves[leaf, state, start + w]
                nodes[leaf * size + 4 * _CHUNK + w] = whole
        for t in range(len(merges)):
            powers[:] = -2  # the frequencies of the states at the root, 1/4
            for k in range(n - 1):
                _closed_form_merge(nodes, merges[t, k, 0] * size, merges[t, k, 1] * size, (n + k) * size, edges[t, k],
                                   powers, chunk)  # fmt: skip
            roots[:chunk] = nodes[(2 * n - 2) * size + 4 * _CHUNK : (2 * n - 2) * size + 4 * _CHUNK + chunk]
            b = t if len(frequencies) > 1 else 0
            logs[t] += weighted_logs(roots, powers, weights[start : start + chunk])
            if invariant[b] > 0:
                logs[t] += _invariant_logs(roots, powers, weights[start : start + chunk],
                                           common[start : start + chunk], frequencies[b], invariant[b])  # fmt: skip
    return logs


@kept_njit()
def _closed_form_merge(nodes, x, y, out, edges, powers, chunk):  # type: ignore[no-untyped-def]
    """One node's chunk, scaled so that its sum is from 1 to 2."""
    stay_x, move_x = broadcast(edges[0, 0]), broadcast(edges[0, 1])
    stay_y, move_y = broadcast(edges[1, 0]), broadcast(edges[1, 1])
    for w in range(0, chunk, LANES):
        mx = multiply(move_x, load(nodes, x + 4 * _CHUNK + w))
        my = multiply(move_y, load(nodes, y + 4 * _CHUNK + w))
        a = multiply(multiply_add(stay_x, load(nodes, x + w), mx), multiply_add(stay_y, load(nodes, y + w), my))
        c = multiply(
            multiply_add(stay_x, load(nodes, x + _CHUNK + w), mx), multiply_add(stay_y, load(nodes, y + _CHUNK + w), my)
        )
        g = multiply(
            multiply_add(stay_x, load(nodes, x + 2 * _CHUNK + w), mx),
            multiply_add(stay_y, load(nodes, y + 2 * _CHUNK + w), my),
        )
        u = multiply(
            multiply_add(stay_x, load(nodes, x + 3 * _CHUNK + w), mx),
            multiply_add(stay_y, load(nodes, y + 3 * _CHUNK + w), my),
        )
        whole = add(add(a, c), add(g, u))
        factor = power_to_unit(whole)
        store(nodes, out + w, multiply(a, factor))
        store(nodes, out + _CHUNK + w, multiply(c, factor))
        store(nodes, out + 2 * _CHUNK + w, multiply(g, factor))
        store(nodes, out + 3 * _CHUNK + w, multiply(u, factor))
        store(nodes, out + 4 * _CHUNK + w, multiply(whole, factor))
        store(powers, w, add(load(powers, w), exponent(whole)))


@kept_njit()
def trees(leaves, weights, common, merges, edges, frequencies, invariant):  # type: ignore[no-untyped-def]
    n, _, patterns = leaves.shape
    categories = edges.shape[3]
    leaf_size, size = 4 * _CHUNK, categories * 4 * _CHUNK
    nodes = _scratch(n * leaf_size + (n - 1) * size)
    powers = np.empty(_CHUNK, dtype=np.float32)
    roots = np.empty(_CHUNK, dtype=np.float32)
    logs = np.zeros(len(merges))
    for start in range(0, patterns, _CHUNK):
        chunk = min(_CHUNK, patterns - start)
        for leaf in range(n):
            for state in range(4):
                place = leaf * leaf_size + state * _CHUNK
                nodes[place : place + chunk] = leaves[leaf, state, start : start + chunk]
        for t in range(len(merges)):
            powers[:] = 0
            for k in range(n - 1):
                out = n * leaf_size + k * size
                for child in range(2):
                    node = merges[t, k, child]
                    x = node * leaf_size if node < n else n * leaf_size + (node - n) * size
                    _along_edge(nodes, x, node < n, nodes, out, edges[t, k, child], _CHUNK, chunk, child == 1)
                _rescale(nodes, out, categories, powers, chunk)
            b = t if len(frequencies) > 1 else 0
            _at_root(nodes, n * leaf_size + (n - 2) * size, categories, frequencies[b], roots, powers, chunk)
            logs[t] += weighted_logs(roots, powers, weights[start : start + chunk])
            if invariant[b] > 0:
                logs[t] += _invariant_logs(roots, powers, weights[start : start + chunk],
                                           common[start : start + chunk], frequencies[b], invariant[b])  # fmt: skip
    return logs


@kept_njit()
def _along_edge(nodes, x, is_leaf, out_nodes, out, matrices, plane, chunk, times):  # type: ignore[no-untyped-def]
    """A child's partial likelihoods seen from the near end of its edge: written, or multiplied into what is there."""
    for c in range(len(matrices)):
        first = x if is_leaf else x + c * 4 * plane
        for i in range(4):
            m0, m1 = broadcast(matrices[c, i, 0]), broadcast(matrices[c, i, 1])
            m2, m3 = broadcast(matrices[c, i, 2]), broadcast(matrices[c, i, 3])
            place = out + (c * 4 + i) * plane
            for w in range(first, first + chunk, LANES):
                value = multiply_add(m0, load(nodes, w), multiply(m1, load(nodes, w + plane)))
                value = multiply_add(m2, load(nodes, w + 2 * plane), value)
                value = multiply_add(m3, load(nodes, w + 3 * plane), value)
                if times:
                    value = multiply(value, load(out_nodes, place + w - first))
                store(out_nodes, place + w - first, value)


@kept_njit()
def _rescale(nodes, out, categories, powers, chunk):  # type: ignore[no-untyped-def]
    """Make the sum of a node's planes from 1 to 2 at every pattern."""
    for w in range(0, chunk, LANES):
        whole = load(nodes, out + w)
        for p in range(1, categories * 4):
            whole = add(whole, load(nodes, out + p * _CHUNK + w))
        factor = power_to_unit(whole)
        for p in range(categories * 4):
            store(nodes, out + p * _CHUNK + w, multiply(load(nodes, out + p * _CHUNK + w), factor))
        store(powers, w, add(load(powers, w), exponent(whole)))


@kept_njit()
def _mean(nodes, x, categories, frequencies, plane):  # type: ignore[no-untyped-def]
    """Mean over categories of the sum over states of frequency times partial likelihood."""
    whole = broadcast(np.float32(0))
    for c in range(categories):
        for i in range(4):
            share = broadcast(np.float32(frequencies[i] / categories))
            whole = multiply_add(share, load(nodes, x + (c * 4 + i) * plane), whole)
    return whole


@kept_njit()
def _at_root(nodes, x, categories, frequencies, roots, powers, chunk):  # type: ignore[no-untyped-def]
    """The likelihoods of a chunk as numbers from 1 to 2 in `roots`, with their exponents added in `powers`."""
    for w in range(0, chunk, LANES):
        whole = _mean(nodes, x + w, categories, frequencies, _CHUNK)
        store(roots, w, multiply(whole, power_to_unit(whole)))
        store(powers, w, add(load(powers, w), exponent(whole)))


@kept_njit()
def join(leaves, tables, left, right, edges, frequencies, step, weights, site_logs):  # type: ignore[no-untyped-def]
    n, _, patterns = leaves.shape
    categories = edges.shape[2]
    size = categories * 4 * patterns
    tips = leaves.reshape(-1)
    roots, powers = np.empty(patterns, dtype=np.float32), np.empty(patterns, dtype=np.float32)
    logs = np.empty(len(tables))
    for t in range(len(tables)):
        nodes = tables[t].reshape(-1)
        for child in range(2):
            node = left[t] if child == 0 else right[t]
            source = tips if node < n else nodes
            x = node * 4 * patterns if node < n else (node - n) * size
            _along_edge(source, x, node < n, nodes, step * size, edges[t, child], patterns, patterns, child == 1)
        _normalise(nodes, step * size, categories, frequencies[t if len(frequencies) > 1 else 0], roots, powers)
        logs[t] = weighted_logs(roots, powers, weights)
        if len(site_logs):
            _add_site_logs(roots, powers, site_logs[t])
    return logs


@kept_njit()
def closed_form_join(leaves, tables, left, right, edges, frequencies, step, weights, site_logs):  # type: ignore[no-untyped-def]
    n, _, patterns = leaves.shape
    size = 4 * patterns
    tips = leaves.reshape(-1)
    roots, powers = np.empty(patterns, dtype=np.float32), np.empty(patterns, dtype=np.float32)
    quarter = broadcast(np.float32(0.25))
    logs = np.empty(len(tables))
    for t in range(len(tables)):
        nodes = tables[t].reshape(-1)
        a, x = (tips, left[t] * size) if left[t] < n else (nodes, (left[t] - n) * size)
        b, y = (tips, right[t] * size) if right[t] < n else (nodes, (right[t] - n) * size)
        stay_x, move_x = broadcast(edges[t, 0, 0]), broadcast(edges[t, 0, 1])
        stay_y, move_y = broadcast(edges[t, 1, 0]), broadcast(edges[t, 1, 1])
        for w in range(0, patterns, LANES):
            x0, x1 = load(a, x + w), load(a, x + patterns + w)
            x2, x3 = load(a, x + 2 * patterns + w), load(a, x + 3 * patterns + w)
            y0, y1 = load(b, y + w), load(b, y + patterns + w)
            y2, y3 = load(b, y + 2 * patterns + w), load(b, y + 3 * patterns + w)
            mx = multiply(move_x, add(add(x0, x1), add(x2, x3)))
            my = multiply(move_y, add(add(y0, y1), add(y2, y3)))
            z0 = multiply(multiply_add(stay_x, x0, mx), multiply_add(stay_y, y0, my))
            z1 = multiply(multiply_add(stay_x, x1, mx), multiply_add(stay_y, y1, my))
            z2 = multiply(multiply_add(stay_x, x2, mx), multiply_add(stay_y, y2, my))
            z3 = multiply(multiply_add(stay_x, x3, mx), multiply_add(stay_y, y3, my))
            whole = multiply(quarter, add(add(z0, z1), add(z2, z3)))
            store(roots, w, multiply(whole, power_to_unit(whole)))
            store(powers, w, exponent(whole))
            factor = reciprocal(whole)
            out = step * size + w
            store(nodes, out, multiply(z0, factor))
            store(nodes, out + patterns, multiply(z1, factor))
            store(nodes, out + 2 * patterns, multiply(z2, factor))
            store(nodes, out + 3 * patterns, multiply(z3, factor))
        logs[t] = weighted_logs(roots, powers, weights)
        if len(site_logs):
            _add_site_logs(roots, powers, site_logs[t])
    return logs


@kept_njit()
def _normalise(nodes, out, categories, frequencies, roots, powers):  # type: ignore[no-untyped-def]
    """Make a node's mean 1, and say what it was: roots 2^powers."""
    patterns = len(roots)
    for w in range(0, patterns, LANES):
        whole = _mean(nodes, out + w, categories, frequencies, patterns)
        store(roots, w, multiply(whole, power_to_unit(whole)))
        store(powers, w, exponent(whole))
        factor = reciprocal(whole)
        for p in range(categories * 4):
            place = out + p * patterns + w
            store(nodes, place, multiply(load(nodes, place), factor))


@kept_njit()
def _add_site_logs(roots, powers, site_logs):  # type: ignore[no-untyped-def]
    for w in range(len(site_logs)):
        site_logs[w] += math.log(np.float64(roots[w])) + powers[w] * _LOG_2


@kept_njit()
def _invariant_logs(roots, powers, weights, common, frequencies, invariant):  # type: ignore[no-untyped-def]
    """What sites that never change add to the weighted logarithms of a chunk."""
    total = weights.sum() * math.log1p(-invariant)
    for w in range(len(weights)):
        if common[w]:
            states = 0.0
            for i in range(4):
                if common[w] >> i & 1:
                    states += frequencies[i]
            log = math.log(np.float64(roots[w])) + powers[w] * _LOG_2
            ratio = math.log(invariant * states / (1 - invariant)) - log
            total += weights[w] * (max(ratio, 0.0) + math.log1p(math.exp(-abs(ratio))))
    return total


@kept_njit()
def weighted_logs(roots, powers, weights):  # type: ignore[no-untyped-def]
    """Sum of weights log(roots 2^powers), roots from 1 to 2."""
    total, below = _unit_logs(roots, powers, weights)
    if below:  # a number too small to be scaled, or 0
        total = 0.0
        for w in range(len(weights)):
            if weights[w] > 0:
                total += weights[w] * (math.log(np.float64(roots[w])) + powers[w] * _LOG_2)
    return total


@kept_njit(fastmath=True)
def _unit_logs(roots, powers, weights):  # type: ignore[no-untyped-def]
    """log m = log(sqrt 2) + 2 artanh((m / sqrt 2 - 1) / (m / sqrt 2 + 1)), whose series is exact to 1e-12 here."""
    total, below = 0.0, 0.0
    for w in range(len(weights)):
        mantissa = roots[w] * math.sqrt(0.5)
        s = np.divide(mantissa - 1, mantissa + 1)  # as / is, but for a test of its own for 0, at which LLVM gives up
        q = s * s
        series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
        total += weights[w] * (2 * s * series + (powers[w] + 0.5) * _LOG_2)
        below += 1.0 if roots[w] < 1 else 0.0
    return total, below
