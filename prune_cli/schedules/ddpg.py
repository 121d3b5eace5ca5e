"""The agent of AMC: deep deterministic policy gradient (Lillicrap et al., arXiv:1509.02971) for one number per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from scipy.stats import truncnorm
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN = 300
ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
FOLLOW = 0.01  # tau, of the target networks
BATCH = 64
SIGMA = 0.5  # of the noise when it begins to fall
BASELINE = 0.5  # decay of the rewards' moving average


@dataclass(frozen=True)
class Transition:
    """One step of an episode; `after` is None at its end."""

    state: np.ndarray
    action: float
    reward: float
    after: np.ndarray | None


class Agent:
    """Actor and critic, their slow copies, and what they remember. All randomness is the generator's.

    Args:
        features: length of a state vector.
        generator: source of random numbers.
        memory: transitions that are kept.
        decay: factor on the noise from episode to episode.
    """

    def __init__(self, features: int, generator: np.random.Generator, memory: int, decay: float) -> None:
        self._generator, self._decay, self._sigma = generator, decay, SIGMA
        self._memory: deque[Transition] = deque(maxlen=memory)
        self._baseline: float | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator.integers(2**31)))
            self._actor, self._slow_actor = _network(features), _network(features)
            self._critic, self._slow_critic = _network(features + 1), _network(features + 1)
        self._slow_actor.load_state_dict(self._actor.state_dict())
        self._slow_critic.load_state_dict(self._critic.state_dict())
        self._actor_steps = torch.optim.Adam(self._actor.parameters(), ACTOR_RATE)
        self._critic_steps = torch.optim.Adam(self._critic.parameters(), CRITIC_RATE)

    def explore(self, low: float, high: float) -> float:
        """A random action, for the first episodes."""
        return float(self._generator.uniform(low, high))

    @torch.no_grad()
    def act(self, state: np.ndarray, low: float, high: float, *, noise: bool = True) -> float:
        """What the actor does, with noise from a normal distribution that is cut at the bounds."""
        mean = float(torch.sigmoid(self._actor(_tensor(state[None])))[0, 0])
        if not noise or high <= low or self._sigma < 1e-6:
            return min(max(mean, low), high)
        ends = (low - mean) / self._sigma, (high - mean) / self._sigma
        return float(truncnorm.rvs(*ends, loc=mean, scale=self._sigma, random_state=self._generator))

    def learn(self, episode: list[Transition]) -> None:
        """Takes an episode to memory and learns as many times as it has steps; the noise falls."""
        self._memory.extend(episode)
        for _ in episode:
            self._step()
        self._sigma *= self._decay

    def remember(self, episode: list[Transition]) -> None:
        """Takes an episode to memory alone."""
        self._memory.extend(episode)

    def policy(self) -> bytes:
        """The actor's weights as a safetensors file."""
        return safetensors.torch.save({name: value.contiguous() for name, value in self._actor.state_dict().items()})

    def follow(self, policy: Mapping[str, Tensor]) -> None:
        """Takes an actor's weights.

        Raises:
            RuntimeError: of another kind of actor, or weights that are not finite.
        """
        if not all(torch.isfinite(value).all() for value in policy.values()):
            raise RuntimeError("weights that are not finite")
        self._actor.load_state_dict(policy)
        self._slow_actor.load_state_dict(policy)

    def _step(self) -> None:
        chosen = [self._memory[index] for index in self._generator.integers(len(self._memory), size=BATCH)]
        mean = float(np.mean([one.reward for one in chosen]))
        self._baseline = mean if self._baseline is None else BASELINE * self._baseline + (1 - BASELINE) * mean
        states = _tensor(np.stack([one.state for one in chosen]))
        actions = _tensor(np.array([[one.action] for one in chosen]))
        goes_on = _tensor(np.array([[one.after is not None] for one in chosen]))
        afters = _tensor(np.stack([one.state if one.after is None else one.after for one in chosen]))
        rewards = _tensor(np.array([[one.reward - self._baseline] for one in chosen]))
        with torch.no_grad():
            later = self._slow_critic(torch.cat([afters, torch.sigmoid(self._slow_actor(afters))], 1))
            wanted = rewards + goes_on * later
        self._descend(self._critic_steps, F.mse_loss(self._critic(torch.cat([states, actions], 1)), wanted))
        value = self._critic(torch.cat([states, torch.sigmoid(self._actor(states))], 1))
        self._descend(self._actor_steps, -value.mean())
        with torch.no_grad():
            for slow, fast in ((self._slow_actor, self._actor), (self._slow_critic, self._critic)):
                for target, source in zip(slow.parameters(), fast.parameters(), strict=True):
                    target.lerp_(source, FOLLOW)

    @staticmethod
    def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _network(features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
    )


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
