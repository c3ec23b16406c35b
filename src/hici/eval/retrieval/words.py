"""Words of generated prompts. A word that changes changes prompts, and so results."""

from __future__ import annotations

_ADJECTIVES = """
able aged airy amber ample arid azure bald bare basic bent big bitter black blank blunt bold brave brief bright
brisk broad brown calm cheap chief civil clean clear clever close cloudy cold cool crisp cruel curly damp dark dear
deep dense dim dizzy dry dull dusty eager early easy empty equal exact faint fair famous fancy far fat fierce final
fine firm flat fond foreign frail free fresh full funny gentle giant glad golden good grand great green grey happy
harsh heavy hollow honest hot huge humble hungry icy idle jolly keen kind large late lazy lean light
"""
_NOUNS = """
acorn anchor apple apron arrow attic badge bagel banjo barn basket beach beard bell bench bird blanket boat bottle
branch bread brick bridge broom bucket button cabin cactus camel candle canoe canyon carpet castle cave chair cherry
church cliff clock cloud coat comet copper cradle crane crown curtain desert diary dragon drum eagle engine fabric
feather fence ferry fiddle field finger flag flame flute forest fountain fox garden gate glove goat grape hammer
harbour hat hedge helmet hill horn house island jacket jungle kettle kitten ladder lake lamp lantern lemon letter
lion lobster magnet
"""
_NAMES = """
Amber Aspen Basil Birch Cedar Clover Coral Cosmos Dahlia Ebony Falcon Fennel Garnet Ginger Hazel Heron Indigo Iris
Jasmine Juniper Kestrel Laurel Linden Lotus Magnolia Maple Marigold Nutmeg Olive Onyx Opal Orchid Pearl Pepper
Quartz Raven Rowan Saffron Sage Sorrel Thistle Topaz Tulip Umber Violet Walnut Willow Zinnia
"""

ADJECTIVES, NOUNS, NAMES = (tuple(words.split()) for words in (_ADJECTIVES, _NOUNS, _NAMES))
