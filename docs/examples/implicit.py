"""Hyperparameter tuning: one regularisation strength for each feature of a regression, by their exact gradient.

The lower level is a ridge regression that any solver may have solved; the upper level is its loss on held-out data. Only
the first of the features carry information, so the others' strengths should grow.

Replace `training_loss` and `held_out_loss` with your own, and `fit` with however you minimise the former.
"""

import torch

import parl_core as parl


def main(steps: int = 100) -> dict[str, float]:
    torch.manual_seed(0)
    num_features, num_useful, num_samples = 10, 3, 30
    truth = torch.cat((torch.ones(num_useful), torch.zeros(num_features - num_useful))).double()
    train_x, held_out_x = torch.randn(2, num_samples, num_features, dtype=torch.float64)
    train_y = train_x @ truth + torch.randn(num_samples, dtype=torch.float64)
    held_out_y = held_out_x @ truth + torch.randn(num_samples, dtype=torch.float64)

    def training_loss(upper, lower):
        error = train_x @ lower["weight"] - train_y
        return (error**2).sum() + (upper["log_strength"].exp() * lower["weight"] ** 2).sum()

    def held_out_loss(upper, lower):
        return ((held_out_x @ lower["weight"] - held_out_y) ** 2).mean()

    def fit(log_strength):
        return torch.linalg.solve(train_x.T @ train_x + torch.diag(log_strength.exp()), train_x.T @ train_y)

    log_strength = torch.zeros(num_features, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_strength], lr=0.1)
    losses = []
    for step in range(steps):
        weight = fit(log_strength).detach()
        optimizer.zero_grad()
        result = parl.implicit_gradient(
            held_out_loss,
            training_loss,
            {"log_strength": log_strength},
            {"weight": weight},
            solver=parl.CG(rtol=1e-10),
        )
        result.backward()
        if step == 0:  # this lower level has a closed form, so that here the gradient can be had by autograd as well
            (exact,) = torch.autograd.grad(held_out_loss({}, {"weight": fit(log_strength)}), log_strength)
            error = float((result.total - exact).norm() / exact.norm())
        optimizer.step()
        losses.append(float(held_out_loss({}, {"weight": weight})))
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:3d}   held-out loss {losses[-1]:.4f}")

    strength = log_strength.detach().exp()
    useful, useless = strength[:num_useful].median(), strength[num_useful:].median()
    print(f"relative difference from the closed form's gradient: {error:.1e}")
    print(f"median strength: {useful:.2f} on useful features, {useless:.2f} on useless ones")
    return {"first": losses[0], "last": losses[-1], "error": error, "useful": float(useful), "useless": float(useless)}


if __name__ == "__main__":
    main()
