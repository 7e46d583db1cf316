"""Peers, calls, and a hash table of signed records that expire"""
import lazy_loader as _lazy
import multiaddr.resolvers.dns as _dns

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)  # the names are in the stub beside this file

# libp2p makes a resolver as it is imported, and that ends where resolv.conf is empty; `addresses` resolves names instead
_dns.DNSResolver.__init__ = lambda self: None
