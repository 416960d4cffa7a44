"""Language models as samplers: trajectory balance with asynchrony (TBA, Bartoldson et al. 2025, arXiv 2503.18929) on
any causal language model of `transformers`.
"""

from importlib.util import find_spec

for _needed in ("transformers", "peft"):
    if find_spec(_needed) is None:
        raise ImportError(f"language models need {_needed}: pip install 'headwater[language]'")
