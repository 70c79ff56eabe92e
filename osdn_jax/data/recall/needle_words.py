"""Words for the keys of needles, such as amber-harbour."""

ADJECTIVES = (
    "amber ancient arctic autumn bitter brave breezy bright brisk calm careful cheerful clever cloudy "
    "coastal copper crimson curious daring distant dusty eager early elegant faithful fancy fearless "
    "fierce foggy fragile frozen gentle gilded glossy golden graceful grand hidden hollow honest humble "
    "icy ivory jolly lively lonely loyal lunar mellow misty mighty modest narrow nimble noble northern "
    "patient polished proud quiet rapid restless rustic scarlet secret silent silver sleepy slender solar "
    "solid southern spotless stormy sturdy sunny swift tender thorny tidy tranquil upright velvet vivid "
    "wandering western wild windy winter wooden"
).split()

NOUNS = (
    "anchor anvil apple arrow badger balcony basket beacon blanket bottle bridge brook bucket button "
    "cabin candle canyon castle cedar chapel cherry clock compass cottage cradle cricket curtain desert "
    "dolphin donkey drum eagle ember engine falcon feather fiddle forest fountain garden glacier goblet "
    "hammer harbour hedge helmet hermit island kettle ladder lantern lemon lighthouse lizard locket "
    "magnet maple meadow mirror mountain needle oak orchard otter paddle parrot pebble pepper pigeon "
    "pillow planet plum pocket puddle raven ribbon river rocket saddle sailor satchel shepherd shovel "
    "sparrow spindle squirrel temple thimble thistle tower tulip tunnel turnip valley village violin "
    "walnut whistle window"
).split()
