"""Words of generated tasks: adjectives and nouns for keys, common and each once; names and phrases for prose."""

from __future__ import annotations

_ADJECTIVES = """
    able ample amused ancient angular antique ardent arid ashen autumn awake
    balmy bashful basic blissful blunt bold bouncy brave breezy brief bright brisk broad bronze bubbly busy
    calm candid careful casual cheerful chilly civil clean clever cloudy coarse cobalt cold comic copper coral cosmic
    cozy crimson crisp curious curly
    dapper daring deep delicate dense distant dizzy dreamy dry dusty
    eager early earnest easy elastic elegant empty endless even exact
    faint fair famous fancy fearless festive fierce final firm flaky flat fluffy foggy fond formal fragile frank fresh
    friendly frosty frugal full funny fuzzy
    gentle giant gifted glad gleaming glossy golden good graceful grand grateful greasy great green gritty
    handy happy hardy harsh hasty hazy hearty heavy helpful hollow honest huge humble hungry
    icy ideal idle immense inner iron ivory
    jagged jolly joyful juicy
    keen kind
    large lavish lazy lean lively lofty lonely long loud loyal lucid lucky lunar
    magnetic major mellow merry mighty mild minor misty modern modest muddy murky mute
    narrow neat nervous nimble noble noisy normal novel
    odd olive open orange outer oval
    pale patient peaceful perky placid plain playful pleasant plump polite prime proud prudent purple
    quaint quick quiet quirky
    rapid rare raw ready regal remote rich rigid robust rough round royal ruby rugged rustic rusty
    salty sandy scarlet secret serene sharp shiny short shy silent silky silver simple sincere sleek slender slim slow
    small smoky smooth snowy sober soft solar solid sour sparse spicy spiral stable stark steady steep sterile stormy
    strict strong sturdy subtle sudden sunny superb sweet swift
    tacit tall tame tart tender thick thin thorny thrifty tidy tiny tired tranquil true
    upbeat urban useful usual
    vague valid vast velvet verbal vibrant violet vivid vocal
    warm wary watery wavy weary wet white whole wide wild windy wise witty wooden woolly
    yellow young youthful zany zealous zesty
"""

_NOUNS = """
    acorn actor adapter album alley almond amber anchor ankle antenna anvil apple apron arcade arch arena armchair
    arrow artist atlas attic author avenue axle
    badge bagel bakery balcony ballad balloon bamboo banana banjo banner barley barn barrel basket battery beach beacon
    beaver bedroom beetle bell bench berry bicycle biscuit blanket blossom boat bonfire book border bottle boulder
    bowl bracket branch bread breeze brick bridge broom brush bucket buckle buffalo builder butter button
    cabin cable cactus camel camera canal candle canoe canvas canyon captain caravan carpet carrot cart castle cedar
    cellar cello chain chair chalk chapel cherry chest chimney circle citadel clay cliff cloak clock cloud clover coach
    coast cobbler coffee collar comet compass concert copse cottage cotton cousin crane crate crater crayon creek
    cricket crown crystal cupboard curtain cushion cymbal
    daisy dancer dawn deck desert desk diamond diary dinner dolphin donkey door dragon drawer drum dune
    eagle earring easel echo elbow elephant ember engine envelope estuary evening
    fabric factory falcon farmer feather fence fern ferry fiddle field finch finger fjord flag flame flask flower flute
    folder forest fork fossil fountain fox frame freckle freight friend furnace
    galaxy garden garlic garnet gate geyser ginger giraffe glacier glove goblet goose granite grape grove guitar gulf
    hammer hammock harbor harp harvest hat hazel heath hedge helmet heron hill hinge honey hook horizon hornet horse
    hotel hut
    iceberg igloo inkwell inlet insect island
    jacket jaguar jam jewel jigsaw journal jug juniper
    kayak kernel kettle keyboard kitchen kite kitten knapsack knot
    ladder lagoon lake lamp lantern larch lark laundry lawn leaf ledger lemon lentil letter lever library lichen
    lighthouse lily lizard locket loom lumber lynx
    magnet mallet mango mantle map maple marble market marmot marsh mask mast meadow medal melon mill mirror mitten
    moat monsoon moon moss mountain museum mushroom mustard
    napkin necklace needle nest nettle notebook nutmeg
    oak oasis oboe ocean office onion opal orchard orchid organ otter oven owl oyster
    paddle palace palm panther paper parade parcel park parrot parsley pasture path pavilion peach peanut pear pebble
    pelican pencil penguin pepper perch piano picnic pier pigeon pillow pine pistachio planet plank plaza plum pocket
    poem pond poppy porch portrait potato prairie prism pumpkin puppet puzzle pyramid
    quail quarry quartz quill quilt quiver
    rabbit radish raft railway rain rake ranch raven reef reservoir ribbon ridge river road robin rocket roof rope rose
    rudder ruler
    saddle saffron sail salmon sand sandal sapphire satchel saucer scarf school scooter sculptor seagull seed shawl
    sheep shelf shell shovel shrub signal skate sketch sled sleeve slipper snail soil sparrow spatula spindle spoon
    spring spruce square squirrel stable staircase star station statue stone stool stove stream street suitcase summer
    summit swan sweater
    table tailor tambourine tapestry teacup temple tent thicket thimble thistle thread throne thunder ticket tiger
    timber toast tomato torch tower tractor trail train treasure trellis trumpet tulip tundra tunnel turnip turtle
    umbrella uncle unicorn urn
    valley vase veranda village vine vineyard violin volcano voyage
    waffle wagon wall walnut walrus warehouse watch water waterfall wave weaver well whale wharf wheat wheel whistle
    willow window winter wolf wood wren
    yacht yard yarn zebra zipper
"""

ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())

_NAMES = """
    Ada Alba Boris Bruno Celia Clara Dario Dmitri Edda Elena Farid Felix Greta Gwen Henrik Hugo Ilse Ines Jonas Jorge
    Karin Katya Lionel Luca Maud Mira Nadia Nils Olga Oscar Pavel Priya Quentin Rita Rosa Stefan Sven Tara Ugo Vera
    Walter Xenia Yusuf Zoe
"""

_SYLLABLES = "bar den fal gor hul kam lin mor nes pol rus sel tav vin wes zan"
_TRADES = "baker botanist carpenter dentist geologist glazier lawyer mason painter pilot tailor weaver"
_VERBS = "carried painted repaired sold borrowed measured described forgot buried counted traded guarded"

_PLACES = """
    the market; the harbour; the old library; the station; the north gate; the mill; the assembly hall; the river bank;
    the workshop; the schoolyard; the observatory; the upper village
"""

_TIMES = """
    In the morning; Late in the evening; After the first frost; On the day of the fair; Before anyone noticed;
    During the long summer; Two years later; That same week; Once the rain had stopped; Against all advice
"""

_CLAIMS = """
    had always belonged to the family; was worth more than it seemed; could be mended with patience;
    had come from the other side of the valley; was too heavy for one person; would outlast them all;
    had been lost during the move; reminded everyone of an older story; was not for sale at any price;
    would look different by daylight
"""


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(";"))


NAMES, SYLLABLES = tuple(_NAMES.split()), tuple(_SYLLABLES.split())
TRADES, VERBS = tuple(_TRADES.split()), tuple(_VERBS.split())
PLACES, TIMES, CLAIMS = _phrases(_PLACES), _phrases(_TIMES), _phrases(_CLAIMS)
