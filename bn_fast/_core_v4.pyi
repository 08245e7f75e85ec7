from ._core_base import *
