from __future__ import annotations

from torch import nn

from megatron.optim.groups import parameter_groups


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(nn.Linear(4, 1).weight.detach().flatten())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.dense = nn.Linear(4, 4)
        self.last = RMSNorm()
        self.flagged = nn.Parameter(nn.Linear(4, 4).weight.detach())
        self.flagged.no_weight_decay = True  # type: ignore[attr-defined]
        self.frozen = nn.Parameter(nn.Linear(4, 4).weight.detach(), requires_grad=False)
        self.final_linear = nn.Linear(4, 8, bias=False)


def names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_norms_biases_and_flagged_parameters_do_not_decay() -> None:
    model = Model()
    decayed, exempt = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert names(model, decayed["params"]) == {"word_embeddings.weight", "dense.weight", "final_linear.weight"}
    assert names(model, exempt["params"]) == {"norm.weight", "norm.bias", "dense.bias", "last.scale", "flagged"}


def test_without_weight_decay_there_is_one_group() -> None:
    (group,) = parameter_groups(Model(), 0.0)
    assert (group["weight_decay"], len(group["params"])) == (0.0, 8)


def test_a_tied_matrix_is_in_one_group_once() -> None:
    model = Model()
    model.final_linear.weight = model.word_embeddings.weight
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == 7


def test_mup_slows_hidden_matrices_and_nothing_else() -> None:
    model = Model()
    slowed = [group for group in parameter_groups(model, 0.1, mup_width_scale=4.0) if "lr_scale" in group]
    assert {group["lr_scale"] for group in slowed} == {0.25}
    assert set().union(*(names(model, group["params"]) for group in slowed)) == {"dense.weight", "flagged"}
