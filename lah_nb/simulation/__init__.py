"""Thousands of peers in virtual time"""
import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)  # the names are in the stub beside this file
