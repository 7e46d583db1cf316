"A swarm that exists on paper, as the text of a cell: what a `SwarmView` reads at every tick"
SOURCE = '''
import random
from lah_nb import SwarmView
class Source:
    "A swarm that exists on paper: every tick has other loads, and calls to some peers"
    def __init__(self, peers, each, n):
        self.ids = [f'12D3KooW{i:044d}' for i in range(peers + 1)]
        uids = [f'ffn.{i // n}.{i % n}' for i in range(peers * each)]
        self.peers = [{'peer_id': self.ids[i], 'addrs': ['/ip4/127.0.0.1/tcp/1'], 'experts': uids[i * each:(i + 1) * each], 'alive': True, 'state': 'alive', 'updates': 7, 'latency': .001} for i in range(peers)]
        self.links, self.uids, self.ticks = [[self.ids[i], self.ids[(i * 7 + j) % peers]] for i in range(peers) for j in (1, 2, 3)] + [[self.ids[-1], self.ids[0]]], uids, 0
    def __call__(self):
        self.ticks += 1
        return {'peers': self.peers, 'experts': len(self.uids), 'links': self.links, 'rates': {uid: 50 * random.random() for uid in self.uids}, 'calls': {peer: [2, 3 * self.ticks] for peer in self.ids[:5]}, 'own': self.ids[-1]}
'''
