"""Words for the stories. They are short and common, and no filler sentence contains them."""

_OBJECTS = """
    anchor apple arrow basket bell bottle bridge bucket button cabin camera candle carpet castle chain chair clock coat coin
    crown cup desk diamond door drum engine feather fence flag flute fork garden gate glass glove guitar hammer harbor hat
    helmet island jacket jewel kettle key kite knife ladder lamp lantern lemon letter lock magnet map mask mirror mountain
    needle nest notebook orange organ paddle paint pearl pencil piano pillow pipe plate pocket pump ribbon ring river rocket
    rope saddle sail scarf shield shoe silver sofa spoon statue stone stove table tent thread ticket tower train trumpet
    tunnel umbrella vase violin wagon wallet watch wheel whistle window wire wolf yard
"""
OBJECTS = tuple(_OBJECTS.split())
PERSONS = ("Mary", "John", "Sandra", "Daniel", "Bill", "Julie", "Fred", "Jeff")
PLACES = ("kitchen", "garden", "office", "bathroom", "bedroom", "hallway", "school", "park", "cinema", "station")
MOVES = ("moved to", "went to", "travelled to", "walked to")
