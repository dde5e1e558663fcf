"""Configuration: the tree of keys (`tree`) and how it is read from YAML, environment and flags (`load`)."""

from inferflux.config.tree import Config as Config
from inferflux.config.tree import FairnessConfig as FairnessConfig
from inferflux.config.tree import KernelsConfig as KernelsConfig
from inferflux.config.tree import ModelConfig as ModelConfig
from inferflux.config.tree import PagedKvConfig as PagedKvConfig
from inferflux.config.tree import RuntimeConfig as RuntimeConfig
from inferflux.config.tree import SchedulerConfig as SchedulerConfig
