"""fastgrpo: online reinforcement learning for flow-matching image and video models, fast and exactly."""

__version__ = "0.1.0"
