"""Language models as samplers: trajectory balance with asynchrony (TBA, Bartoldson et al. 2025, arXiv 2503.18929) on
any causal language model of `transformers`.
"""
