"""The lookup-expert language model, and its dense and mixture-of-experts twins.

Importing this package registers the three with transformers' Auto classes.
"""

from .backbone import DenseModel, MoeModel, MoleModel, MolePreTrainedModel
from .causal import DenseForCausalLM, MoeForCausalLM, MoleForCausalLM, register

register()

__all__ = [
    "DenseForCausalLM",
    "DenseModel",
    "MoeForCausalLM",
    "MoeModel",
    "MoleForCausalLM",
    "MoleModel",
    "MolePreTrainedModel",
    "register",
]
