"""Methods that decide what is quantized how: graph + settings + statistics -> plan."""

from qlib.quantizers.post_train_linear import layer_infos, plan_post_train_linear

__all__ = ["layer_infos", "plan_post_train_linear"]
