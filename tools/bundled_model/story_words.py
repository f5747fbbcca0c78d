"""Word lists for the story generator: names, animals, places, objects, weather.

Every list is data only. `stories.py` draws from them and `story_plots.py` refers to
the drawn values through slots.
"""

GIRL_NAMES = """Lily Mia Anna Emma Sara Lucy Ella Nora Ruby Clara Ivy Hazel Maya Zoe Alice Daisy Molly Grace
Sophie Chloe Hannah Leah Nina Tara Amy Rosa Olive Stella Violet Jane Kate Beth Eva Lena Mary Elsie Freya Greta Iris
June Kira Lola Mabel Nell Opal Penny Poppy Quinn Rita Sally Tess Una Vera Wendy Yara Zara Amara Bella Carmen Dora
Esther Fiona Gita Helen Indira Julia Layla Marta Noor Priya Rachel Sana Tilly Willa Aisha Bonnie Celia Dina""".split()

BOY_NAMES = """Tom Ben Sam Max Leo Jack Tim Finn Noah Oscar Henry Theo Luke Eli Owen Adam Alex Daniel David Ethan
Felix George Hugo Isaac Jacob James Joel John Karl Liam Lucas Mark Milo Nate Nico Oliver Otto Paul Peter Ravi Remy
Robin Ryan Simon Toby Victor Walter William Zack Amir Anton Arthur Basil Billy Bruno Carlos Charlie Dean Diego Edgar
Emil Frank Gus Harry Ivan Jonas Kofi Lars Marco Ned Omar Pablo Raj Rory Samir Stefan Tariq Umar Vincent Yusuf""".split()

ANIMAL_NAMES = """Pip Bramble Hazelnut Clover Pepper Biscuit Button Maple Willow Rusty Nibbles Whiskers Patch Tango
Fern Bubbles Ginger Honey Juniper Mossy Nutmeg Pebble Pickles Pumpkin Rolo Sandy Scout Shadow Sparky Sunny Teddy
Tulip Waffles Ziggy Acorn Barley Berry Cocoa Dash Dusty Fluff Gizmo Jasper Kiwi Lucky Mango Misty Noodle Oakley Olly
Peanut Puddle Rocket Smoky Snowy Socks Tumble Twig Wiggles Chestnut Bo Coco Dot Fig Momo Plum Tiko""".split()

# Pieces for invented names, so that a model learns to copy any name.
SYLLABLE_START = "Ba Be Bri Ca Cle Da Do Dre El Fa Fi Fro Ga Gle Ha Ho Il Ja Ju Ka Ki La Li Lo Ma Me Mi Na Ne Ni Or Pa Pe Po Qui Ra Re Ro Sa Se Shi Ta Te Tri Ul Va Ve Wi Xa Ya Yo Za Ze".split()
SYLLABLE_MIDDLE = ["", "", "la", "ri", "no", "mi", "da", "ve", "lo", "ka", "bi", "ro", "se"]
SYLLABLE_END = "n na la ra vi to lin mar del ska ndo ry bo sha tte lo x mo ssa ll rk".split()
# Endings that turn a known name into a new one.
NAME_ENDINGS = "bel ndel lina son wick ton ria mund ette kin ley vin dra line bert a ie o us x".split()

# species: (noun, what it has for hands, home, foods it likes)
ANIMALS = [
    ("fox", "paws", "a cozy den", "blackberries"), ("rabbit", "paws", "a snug burrow", "sweet carrots"),
    ("bear", "paws", "a warm cave", "golden honey"), ("mouse", "paws", "a tiny hole under the stairs", "crumbs of cheese"),
    ("hedgehog", "paws", "a nest of leaves", "juicy apples"), ("squirrel", "paws", "a hollow oak tree", "crunchy acorns"),
    ("duck", "wings", "a nest in the reeds", "bits of bread"), ("kitten", "paws", "a basket by the stove", "warm milk"),
    ("puppy", "paws", "a little wooden house", "crispy biscuits"), ("frog", "hands", "a pond with green lily pads", "fresh water bugs"),
    ("turtle", "feet", "a quiet bank by the water", "green lettuce"), ("otter", "paws", "a den by the stream", "silver fish"),
    ("badger", "paws", "a deep, dry tunnel", "wild mushrooms"), ("deer", "hooves", "a shady thicket", "tender leaves"),
    ("lamb", "hooves", "a red barn", "soft clover"), ("piglet", "hooves", "a straw pen", "yellow corn"),
    ("owl", "wings", "a tall pine tree", "warm berry pie"), ("beaver", "paws", "a lodge of sticks", "fresh twigs"),
    ("raccoon", "paws", "an old log", "ripe plums"), ("penguin", "wings", "a house of snow", "little fish"),
    ("elephant", "feet", "a sunny clearing", "ripe bananas"), ("lion cub", "paws", "a rocky den", "cool melon"),
    ("monkey", "hands", "a leafy treetop", "sweet mangoes"), ("dragon", "claws", "a cave on a green hill", "hot peppers"),
    ("dog", "paws", "a house with a red door", "a big bone"), ("cat", "paws", "an attic full of cushions", "a bowl of cream"),
    ("bird", "wings", "a nest in an old tree", "sunflower seeds"), ("horse", "hooves", "a big stable", "fresh hay"), ("wolf", "paws", "a den under the rocks", "wild berries"),
    ("robot", "hands", "a workshop full of tools", "a drop of oil"), ("fairy", "hands", "a house made of petals", "sweet nectar"), ("unicorn", "hooves", "a silver glade", "golden apples"),
    ("goat", "hooves", "a stone hut", "thistles and grass"), ("pony", "hooves", "a small stable", "shiny apples"),
]

# place: (noun phrase, preposition, hiding spots, sights)
PLACES = [
    ("the park", "in", ["under the old bench", "behind the tall fountain", "beside the swings", "near the rose bushes",
     "under the big oak tree", "next to the stone wall"], ["ducks on the pond", "children on the swings", "a man playing a guitar", "bright flower beds"]),
    ("the forest", "in", ["under a pile of leaves", "behind a mossy log", "between two tall pines", "beside a ring of mushrooms",
     "at the foot of an old oak", "near a trickling stream"], ["sunbeams between the trees", "a woodpecker at work", "ferns as tall as a child", "a deer far away"]),
    ("the beach", "on", ["behind a large rock", "under a striped towel", "beside a tide pool", "near the old pier",
     "next to a heap of seaweed", "at the edge of the dunes"], ["white gulls over the waves", "a tiny sailboat", "shells in every color", "crabs running sideways"]),
    ("the meadow", "in", ["among the daisies", "under a hawthorn bush", "beside the wooden fence", "behind a haystack",
     "near a clump of tall grass", "next to a gray stone"], ["butterflies above the flowers", "bees on the clover", "cows in the distance", "a lark high in the sky"]),
    ("the garden", "in", ["under the cabbage leaves", "behind the watering can", "beside the bean poles", "near the little shed",
     "under the apple tree", "next to the strawberry bed"], ["tomatoes as red as lanterns", "a robin on the fence", "rows of sunflowers", "a snail on the path"]),
    ("the farm", "at", ["behind the hen house", "under the hay wagon", "beside the duck pond", "near the barn door",
     "next to the water trough", "between two milk cans"], ["hens in the yard", "a horse by the gate", "a sleepy dog", "piglets in the mud"]),
    ("the hill", "on", ["behind a round boulder", "under a crooked tree", "beside the sandy path", "near the old windmill",
     "in a patch of heather", "next to a fallen branch"], ["the whole village below", "clouds like sheep", "a hawk in the wind", "the shining river far away"]),
    ("the river", "by", ["under the wooden bridge", "behind the reeds", "beside a smooth stone", "near the little dock",
     "at the edge of the water", "next to a willow tree"], ["dragonflies over the water", "a family of ducks", "fish under the bridge", "a boat with a white sail"]),
    ("the lake", "by", ["under an old rowboat", "behind the cattails", "beside the fishing dock", "near a campfire ring",
     "next to a birch tree", "between two flat rocks"], ["a swan on the water", "ripples in the sun", "frogs on the lily pads", "mist over the far shore"]),
    ("the market", "at", ["under the fruit stand", "behind a stack of baskets", "beside the flower cart", "near the baker's table",
     "next to the fish stall", "between two barrels"], ["piles of oranges", "a woman selling honey", "colorful cloth in the wind", "a juggler with five balls"]),
    ("the playground", "at", ["under the slide", "behind the climbing frame", "in the sandbox", "beside the seesaw",
     "near the drinking fountain", "next to the picnic table"], ["children on the slide", "a game of tag", "a spinning merry-go-round", "sparrows near the benches"]),
    ("the orchard", "in", ["under a pear tree", "behind a wooden ladder", "beside a basket of apples", "near the stone gate",
     "in the long grass", "next to a beehive"], ["apples on every branch", "petals in the breeze", "a cart full of pears", "bees in the blossoms"]),
    ("the village square", "in", ["under the clock tower", "behind the old well", "beside the bakery steps", "near the market cross",
     "next to a flower pot", "under a green bench"], ["pigeons around the well", "a baker with fresh bread", "flags on the houses", "a cat asleep in a window"]),
    ("the barn", "in", ["under a pile of hay", "behind a sack of grain", "beside the old tractor", "near the wooden ladder",
     "near an empty bucket", "next to the saddle rack"], ["swallows in the roof", "dust dancing in the light", "a calf in the corner", "an old rope swing"]),
    ("the valley", "in", ["behind a wild rose bush", "under a stone arch", "beside a little brook", "near a ruined tower",
     "next to a pine stump", "in a hollow of soft moss"], ["a silver waterfall", "purple flowers everywhere", "goats on the slopes", "a rainbow over the brook"]),
    ("the harbor", "at", ["behind a coil of rope", "under an old net", "beside a blue boat", "near the lighthouse",
     "next to a wooden crate", "between two barrels of fish"], ["tall ships at rest", "gulls on the posts", "sailors singing", "the white lighthouse"]),
    ("the library", "in", ["under the reading table", "behind a row of thick books", "beside the big globe", "near the window seat",
     "next to the story corner", "near the lowest shelf"], ["shelves up to the ceiling", "a cat asleep on a chair", "a map of the world", "children reading quietly"]),
    ("the schoolyard", "in", ["behind the bicycle rack", "under the maple tree", "beside the front steps", "near the flag pole",
     "next to the jump rope box", "at the end of the long wall"], ["children jumping rope", "chalk drawings on the ground", "a ball game", "a teacher with a whistle"]),
]

COLORS = "red blue green yellow purple orange golden silver white pink".split()
QUALITIES = "shiny tiny striped old wooden bright little new round painted soft beautiful".split()

# object: (noun, what one does with it, adjectives that do not fit)
OBJECTS = [
    ("kite", "watch it dance in the sky", "round"), ("ball", "bounce it against the wall", ""), ("drum", "tap out happy songs on it", "soft"),
    ("boat", "float it on the water", "soft"), ("hat", "wear it on every walk", "wooden"), ("scarf", "wear it on cold days", "wooden round"),
    ("book", "read it under a tree", "round wooden soft"), ("lantern", "carry it on dark evenings", "soft"), ("bell", "ring it at breakfast", "soft"),
    ("whistle", "blow it on long walks", "soft round"), ("basket", "fill it with flowers", "soft"), ("key", "wear it on a string", "soft round"),
    ("umbrella", "twirl it in the rain", "wooden round soft tiny"), ("shell", "hold it close and hear the sea", "wooden soft new"),
    ("feather", "tickle noses with it", "wooden round new painted"), ("marble", "roll it across the floor", "wooden soft"),
    ("button", "keep it in a little box", "soft"), ("map", "dream of far places", "wooden round soft"), ("flute", "play sweet tunes on it", "soft round"),
    ("spinning top", "make it hum on the table", "soft round"), ("toy train", "push it around the room", "soft round"),
    ("teddy bear", "hug it every night", "wooden round painted"), ("doll", "sing songs to it", "round"), ("wagon", "pull it down the lane", "soft round"),
    ("ribbon", "let it flutter in the breeze", "wooden round"), ("paper plane", "send it flying across the room", "wooden round soft old"),
    ("bracelet", "wear it on special days", "round"), ("puppet", "put on funny shows with it", "round"), ("pocket watch", "listen to it tick", "soft wooden round"),
    ("blanket", "curl up under it", "wooden round shiny"), ("bucket", "carry water and sand in it", "soft"), ("crayon", "draw pictures of friends with it", "wooden round soft"),
]
# Objects that the wind can carry off into a tree.
LIGHT_OBJECTS = ["kite", "hat", "scarf", "paper plane", "ribbon", "umbrella", "feather", "ball"]

# food: (phrase with its article, short definite phrase, pronoun)
FOODS = [
    ("a basket of strawberries", "the strawberries", "them"), ("a warm loaf of bread", "the bread", "it"),
    ("a honey cake", "the cake", "it"), ("a bag of cherries", "the cherries", "them"), ("an apple pie", "the pie", "it"),
    ("a plate of cookies", "the cookies", "them"), ("a jar of jam", "the jam", "it"), ("a bowl of berries", "the berries", "them"),
    ("a box of raisins", "the raisins", "them"), ("a pot of soup", "the soup", "it"), ("a bag of nuts", "the nuts", "them"),
    ("a stack of pancakes", "the pancakes", "them"), ("a big sandwich", "the sandwich", "it"), ("a slice of melon", "the melon", "it"),
    ("a tray of muffins", "the muffins", "them"), ("a blueberry tart", "the tart", "it"), ("a basket of pears", "the pears", "them"),
]

# elder: (introduction, short form, gender)
ELDERS = [
    ("old Mr. Finch, the gardener", "Mr. Finch", "m"), ("Mrs. Plum, the baker", "Mrs. Plum", "f"), ("Mr. Oak, the carpenter", "Mr. Oak", "m"),
    ("Miss Reed, the teacher", "Miss Reed", "f"), ("Captain Brook, an old sailor", "Captain Brook", "m"), ("Granny Moss, who knew every plant", "Granny Moss", "f"),
    ("Mrs. Bell, the librarian", "Mrs. Bell", "f"), ("Mr. Stone, the miller", "Mr. Stone", "m"), ("Doctor Lark, the kind doctor", "Doctor Lark", "f"),
    ("Uncle Birch, who mended shoes", "Uncle Birch", "m"), ("Aunt Fern, who kept bees", "Aunt Fern", "f"), ("Mr. Hill, the postman", "Mr. Hill", "m"),
    ("Mrs. Winter, who lived next door", "Mrs. Winter", "f"), ("Farmer Gray, who grew corn", "Farmer Gray", "m"),
    ("a wise old owl", "the old owl", "f"), ("a slow old turtle", "the old turtle", "m"), ("a friendly old goat", "the old goat", "m"),
    ("a gray goose with kind eyes", "the gray goose", "f"),
]

# relative: (word, form of address, gender)
RELATIVES = [("mother", "Mother", "f"), ("mom", "Mom", "f"), ("mom", "Mom", "f"), ("father", "Father", "m"), ("dad", "Dad", "m"), ("grandmother", "Grandma", "f"),
             ("grandma", "Grandma", "f"), ("grandpa", "Grandpa", "m"), ("grandfather", "Grandpa", "m"), ("aunt", "Auntie", "f"), ("uncle", "Uncle", "m"),
             ("big sister", "Sis", "f")]

TRAITS = ["curious", "kind", "cheerful", "brave", "clever", "gentle", "quiet", "lively", "friendly", "thoughtful", "shy", "funny", "careful", "playful", "dreamy", "helpful"]

HOBBIES = ["to sing", "to draw", "to climb trees", "to count the stars", "to run barefoot", "to read stories", "to watch the clouds", "to collect smooth stones",
           "to dance in the rain", "to play hide and seek", "to ask questions", "to explore", "to listen to the birds", "to pick flowers", "to build things",
           "to jump over puddles", "to bake", "to whistle", "to tell jokes", "to paint", "to help others", "to make up songs", "to skip stones", "to look for bugs"]

# weather: (sentences that set the day, phrases for the day's end)
WEATHER = {
    "sunny": (["The sun was {shining|bright and warm}.", "The sky was blue and {clear|there was not a cloud to be seen}.", "It was a {warm|bright|lovely|beautiful} day.",
               "Warm sunlight {fell|poured} over [place]."],
              ["as the sun went down", "under a pink and orange sky", "while the last sunlight faded"]),
    "windy": (["A {strong|fresh|playful} wind was blowing.", "The wind {sang|whistled} in the trees.", "It was a {windy|breezy} day, and the {leaves|branches} {danced|shook}."],
              ["as the wind grew quiet", "while a soft breeze blew", "when the wind had gone to sleep"]),
    "cloudy": (["{Gray|Soft} clouds {covered|filled} the sky.", "It was a {gray|cool|quiet} day.", "The clouds {hung low|drifted slowly} over [place]."],
               ["under the gray evening sky", "as the clouds drifted away", "when the first star peeked out between the clouds"]),
    "misty": (["A {thin|soft|white} mist lay over [place].", "It was a {misty|foggy} day, and everything looked {soft|like a dream}."],
              ["when the mist had lifted", "as the mist came back with the evening", "in the soft evening mist"]),
    "rain": (["It had rained all night, and there were puddles everywhere.", "The rain had {just stopped|stopped at last}, and the air smelled {fresh|sweet}.",
              "Drops of rain still {hung|shone} on the leaves."],
             ["as a rainbow faded over [place]", "past all the shining puddles", "while the last drops fell from the leaves"]),
}

BABIES = [("duckling", "duck", "pond"), ("lamb", "sheep", "field"), ("kitten", "cat", "old shed"), ("puppy", "dog", "farmhouse"), ("chick", "hen", "hen house"),
          ("fawn", "deer", "trees"), ("calf", "cow", "field"), ("owlet", "owl", "tall tree"), ("bunny", "rabbit", "burrow"), ("gosling", "goose", "water"), ("foal", "mare", "stable")]

# thing to build: (noun, materials, failure, second failure, what it is used for)
BUILDS = [
    ("treehouse", "boards and nails", "the first board slid off and fell to the ground", "the floor tilted to one side", "they sat up high and looked out over the land"),
    ("boat", "wood and a sheet of cloth", "it tipped over at once", "water came in through a crack", "it sailed across the water like a swan"),
    ("bridge", "sticks and rope", "the sticks slipped apart", "the rope came loose in the middle", "everyone could cross without getting wet feet"),
    ("birdhouse", "an old box and some paint", "the roof fell off", "the door was too small for any bird", "a family of robins moved in"),
    ("castle", "stones and mud", "the tallest tower fell down", "the walls began to lean", "it stood proud with a flag on top"),
    ("kite", "paper and string", "the paper tore", "it spun around and crashed", "it rose higher than the trees"),
    ("wagon", "planks and four wheels", "one wheel rolled away", "the handle broke off", "it rolled smoothly down the lane"),
    ("swing", "a plank and a long rope", "the knot came undone", "the seat hung crooked", "they took turns and swung up to the sky"),
    ("raft", "logs and vines", "the logs floated apart", "it turned in circles", "it carried them gently along the shore"),
    ("scarecrow", "straw and old clothes", "the head rolled off", "it leaned over like a tired man", "the crows kept far away from the corn"),
    ("snow machine", "a fan and a tin tub", "it only made a loud noise", "it blew dust all over the floor", "cool white flakes came floating down"),
    ("puppet theater", "a big box and some cloth", "the curtain fell down", "the stage was too wobbly", "all the neighbors came to watch a show"),
]

# fear: (noun phrase, moment, first step, second step, result)
FEARS = [
    ("the dark", "They stayed too long, and suddenly it was night, and everything was black", "[He] held [B]'s hand and counted to ten", "[A] looked for the little lights of the stars", "the dark felt soft and quiet, like a big blanket"),
    ("thunder", "All at once a loud boom rolled across the sky", "[He] counted slowly after every flash", "[A] sang a song between the booms", "the thunder sounded like a big, friendly drum"),
    ("deep water", "Everyone was swimming, but [A] stayed on the shore", "[He] put in one toe, and then one foot", "[A] floated on [his] back while [B] held [him] up", "[he] could swim all the way to the big rock"),
    ("high places", "All the others climbed up to see the view, but [A] stayed below", "[He] climbed just one step and rested", "[A] looked up and never down", "[he] stood at the very top and could see the whole world"),
    ("big dogs", "A big brown dog came running down the path", "[He] stood very still and breathed slowly", "[A] let the dog sniff [his] [hands]", "the dog rolled over and wanted to be petted"),
    ("singing in front of others", "There was a song contest that day. When it was [A]'s turn, [his] legs shook", "[He] sang very softly to [B] alone", "[A] closed [his] eyes and sang a little louder", "the whole crowd clapped and asked for one more song"),
    ("the tall slide", "All the others slid down laughing, but [A] only watched", "[He] climbed up halfway and came back down", "[A] sat at the top and held on tight while [B] waited below", "[he] flew down the slide with a happy shout"),
    ("spiders", "A small spider let itself down right in front of [A]", "[He] took one step closer and looked", "[A] watched how carefully it made its web", "[he] saw that the web shone like a silver star"),
    ("the old bridge", "The only way home led over the old bridge, and it creaked", "[He] tested the first plank with one foot", "[A] held the rope and took one step at a time", "[he] stood safely on the other side"),
]

GAMES = ["hide and seek", "tag", "catch", "pirates", "kings and queens", "explorers", "follow the leader", "treasure hunt", "guess the animal", "hopscotch"]

PLANTS = [("sunflower", "taller than the fence"), ("pumpkin", "as big as a wheelbarrow"), ("rose bush", "full of red flowers"), ("bean plant", "climbing high up its pole"),
          ("apple tree", "with tiny green leaves"), ("tomato plant", "heavy with red tomatoes"), ("strawberry plant", "full of sweet berries"), ("melon vine", "long and green, with yellow flowers")]

BREAKABLES = [("vase", "blue"), ("teapot", "flowered"), ("cup", "favorite"), ("lamp", "green"), ("plate", "painted"), ("clock", "old"), ("mirror", "round"), ("jar", "glass"), ("flower pot", "clay"), ("picture frame", "wooden")]

NOISES = [("a strange scratching sound", "a baby hedgehog caught in an empty box"), ("a soft tapping", "a branch knocking gently on the window"),
          ("a long, low whistle", "the wind blowing through an old bottle"), ("a tiny crying voice", "a kitten stuck behind a door"),
          ("a loud rumbling", "an empty barrel rolling back and forth"), ("a funny squeaking", "a rusty gate moving in the breeze"),
          ("a quick rustling", "a mother bird feeding her chicks"), ("a deep croaking", "a fat frog sitting in a bucket"),
          ("a jingling sound", "a lost lamb with a bell around its neck"), ("a steady dripping", "water falling from a pipe into a tin cup")]

SMALL_HELPERS = [("ant", "foot"), ("beetle", "leg"), ("bee", "wing"), ("sparrow", "wing"), ("butterfly", "wing"), ("snail", "shell"), ("ladybug", "wing"), ("field mouse", "tail"), ("firefly", "wing"), ("wren", "foot")]
