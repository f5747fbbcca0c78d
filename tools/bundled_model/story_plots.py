"""Plots of the story generator.

A plot is a list of paragraphs; a paragraph is a list of steps; a step is a list of
alternative templates (an empty string means that the step may be left out). In a
template, `{a|b}` chooses, `[slot]` inserts a fact of the story, and `<STEP>` inserts
one alternative of a shared step. Facts are fixed once per story, so a later paragraph
always agrees with an earlier one.
"""

SHARED = {
    "OPEN": [
        "Once upon a time, there was {a|a little|a young|a [trait]|a [trait] little} [noun] named [A].",
        "Once upon a time, there was a {little|young|[trait]} [noun] named [A].",
        "Once upon a time, there was a little [noun] {named|called} [A] who lived in [home].",
        "Once upon a time, a {little|young|[trait]} [noun] {named|called} [A] lived in [home].",
        "Once there was a {little|young|[trait]} [noun] {named|called} [A].",
        "There was {once |}a {little|young|[trait]} [noun] named [A].",
        "Long ago, {in a land of green hills|in a small village|far beyond the mountains|when the world was quiet}, there lived a {little|young|[trait]} [noun] {named|called} [A].",
        "In {a small village|a quiet town|a green valley|a faraway land|a little town by the sea}, there lived a {little|young|[trait]} [noun] {named|called} [A].",
        "[A] was a {[trait]|little|young|[trait] little} [noun] who lived in [home].",
        "[A] was a {[trait]|little|young} [noun].",
        "In [home], there lived a {little|young|[trait]} [noun] named [A].",
        "This is the story of {a|a little|a young|a [trait]} [noun] named [A].",
        "Not {so |very |}long ago, a {[trait]|little|young} [noun] {named|called} [A] lived in [home].",
        "Everyone {in the village|near [place]} knew [A], {a|the} [trait] {little |young |}[noun].",
    ],
    # Openings that already set the day, and how such a story goes on.
    "OPEN_DAY": [
        "One [wday] {morning|afternoon}, a {little|young|[trait]} [noun] {named|called} [A] {looked out of the window|could not wait to go outside|was in a very good mood}.",
        "One [wday] morning, a {little|young|[trait]} [noun] {named|called} [A] {woke up early|jumped out of bed|woke up with a smile}.",
        "It was a [wday] {morning|day}. [A], a {little|young|[trait]} [noun], {wanted to go outside|looked out of the window|put on [his] hat}.",
    ],
    "DAY_SAME": [
        "[He] {went|walked|hurried|skipped} to [place]. [wx]", "[A] {finished breakfast|waved to [P]} and {went|walked|ran} to [place]. [Sight]", "So [he] {walked|ran|hurried} to [place]. [Sight]",
        "\"{May|Can} I go to [place]?\" [he] asked. \"{Of course|Yes, you may}, but be home before dark,\" said [P].",
    ],
    "TRAIT": [
        "[A] loved [hobby].", "[He] loved [hobby] {more than anything|all day long|every day}.", "[He] was always [trait2], and [he] loved [hobby].",
        "[A] {liked|loved} [hobby] and [hobby2].", "Most of all, [he] {liked|loved} [hobby].", "[He] was {very|always} [trait2].", "Every day, [he] {found|made} time [hobby].",
        "[He] lived with [P] and {liked|loved} [hobby].", "", "", "",
    ],
    "DAY": [
        "One [wday] {morning|day|afternoon}, [A] went to [place].", "One {day|morning|afternoon}, [A] {went|walked|hurried|skipped} to [place]. [wx]",
        "One [wday] {morning|day}, [A] {set out for|walked to|ran to} [place]. [Sight]", "[wx] [A] {put on [his] boots|finished breakfast|waved to [P]} and {went|walked} to [place].",
        "One {day|morning}, [A] {said to|asked} [P], \"{May|Can} I go to [place]?\" \"{Of course|Yes, you may}, but be home before dark,\" said [P].",
        "On {Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday} {morning|afternoon}, [A] went to [place]. [wx]",
        "One {day|morning}, [A] was [pin]. [wx] [Sight]", "It was {early in the morning|a [wday] day|the first day of {spring|summer|autumn}} when [A] {walked|went} to [place]. [Sight]",
    ],
    "LESSON": [
        "[A] {learned|had learned|understood} that [lesson].", "{From that day on|After that day|Ever after}, [A] {knew|remembered} that [lesson].", "And [A] never forgot that [lesson].",
        "\"{Remember|You see|Now you know}, [A],\" said [P], \"[lesson].\"", "That day, [A] {learned|found out} {something important|a good lesson}: [lesson].",
        "[A] thought about it {for a long time|all the way home}. [He] {knew|understood} now that [lesson].",
        "\"{Today I learned|I know now} that [lesson],\" [A] told [P].", "\"What did you learn today?\" asked [P]. \"That [lesson],\" said [A] with a smile.",
    ],
    "CLOSE": [
        "That {night|evening}, [A] told [P] {all|everything} about [memory].", "And whenever [A] came back to [place], [he] {thought of|remembered|smiled and remembered} [memory].",
        "That night, [A] {fell asleep|went to bed} with a smile and {dreamed of|thought about} [memory].", "[A] went home [wxend], {happy and tired|tired but happy|with a light heart}.",
        "For many years, the {two friends|friends} {talked|laughed} about [memory].", "[A] and [B] stayed {friends|best friends|good friends} {forever|for the rest of their lives|for a long, long time}.",
        "[A] and [B] walked home together [wxend].", "At home, [P] {hugged [A]|gave [A] a big hug} and {listened to|smiled at} the {whole |}story of [memory].",
        "[Wxend], [A] walked home {from [place] |}and told [P] about [memory].", "\"What a day!\" said [P] when [A] told [phim] about [memory].",
    ],
    "CLOSE_HOME": [
        "That {night|evening}, [A] {lay in bed|sat by the window} and thought about [memory].", "[A] and [B] stayed {friends|best friends|good friends} {forever|for the rest of their lives|for a long, long time}.",
        "That night, [A] {fell asleep|went to bed} with a smile and {dreamed of|thought about} [memory].", "For many years, the family {talked|laughed} about [memory].",
        "[A] went to bed {early|late} that night, {happy and tired|tired but happy|with a light heart}.", "Before bedtime, [P] {gave [A] a kiss|told [A] a story}, and {all was well|the moon shone in at the window}.",
    ],
    "FIN": ["", "", "", "", "", "The end.", "And they lived happily ever after.", "It was a {very |}{good|happy|wonderful} day.", "[A] could not wait for the next {day|adventure}."],
    "YES": ["\"{Of course|Yes|Sure}!\" said [B].", "\"{I would love to|With pleasure|Gladly},\" [B] {answered|said|replied}.", "[B] nodded {at once|happily|with a smile}."],
    "THANK": [
        "\"Thank you, [B]!\" said [A]. \"You are a {true|good|real|wonderful} friend.\"", "\"Thank you {so much|very much},\" said [A]. \"{I could not have done it without you|You helped me so much}, [B].\"",
        "[A] {hugged [B]|gave [B] a big hug}. \"Thank you!\" [he] said.", "[A] thanked [B] {again and again|with all [his] heart}.",
    ],
    "BDESC": ["", "[B] was [btrait].", "[B] was {known for being|always} [btrait].", "{Everyone said|Everyone knew} that [B] was [btrait]."],
}

PLOTS = {}

PLOTS["lost_object"] = {
    "lessons": ["it is best to look carefully and never give up", "a calm mind finds what a worried one cannot", "we should take good care of the things we love",
                "a friend makes every search easier", "lost things can be found when friends look together"],
    "memory": ["the day the [O] was lost and found", "how [B] had helped to find the [O]", "the long search for the [O]"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"], ["[His] favorite thing {in the whole world |}was a [O].", "[He] had a [O] that [P] had given [him].", "[A] owned a [O], and [he] loved to [use].",
          "For [his] birthday, [P] had given [him] a [O].", "Everywhere [he] went, [he] took {along [his] [O]|[his] [O] with [him]}."],
         ["[He] loved to [use].", "", "It was {the best present [he] had ever had|[his] greatest treasure}.", ""]],
        [["<DAY>"], ["[He] took the [o] along{, as always| and played with it all morning|}.", "[He] {played|ran around|had fun} for a long time with the [o].", "Of course, the [O] came too."],
         ["But when it was time to go home, the [o] was gone!", "Then [he] stopped to look at {the view|a butterfly|the clouds}, and when [he] turned around, the [o] was gone.",
          "But on the way back, [he] noticed that [his] [o] was missing.", "Suddenly [he] {saw|noticed} that the [O] was {missing|gone|nowhere to be seen}."],
         ["\"Oh no!\" {cried|said} [A]. \"{Where is my [o]|Where can my [O] be|I have lost my [o]}?\"", "[A] felt {a lump in [his] throat|like crying|very sad}. \"Where {can it|could it} be?\" [he] {whispered|wondered}.",
          "Tears came to [A]'s eyes. {What would [P] say|How could [he] find it again}?", "[A]'s heart sank."]],
        [["First, [he] looked [s1], but {there was nothing there|it was not there|[he] found only {a dry leaf|an old sock|some dust}}.", "[He] looked [s1]. {Nothing|The [o] was not there}."],
         ["Then [he] looked [s2]. {Still no [o]|It was not there either}.", "", "After that, [he] searched [s2], but {again there was nothing|that was no use}."],
         ["Just then, [Bfriend] {came by|walked past|appeared}. \"Why {are you so sad|do you look so worried}, [A]?\" asked [B].", "[Bfriend] {saw [him] and came over|heard [him]}. \"What is the matter?\" [bhe] asked."],
         ["\"I lost my [O],\" said [A]. \"Will you help me {look for it|find it}?\"", "\"My [O] is {lost|gone},\" [A] {explained|said}. \"I have looked [s1], but I cannot find it. {Please help me.|Can you help me?}\""],
         ["<YES>"], ["\"{When did you see it last|Where did you play with it last}?\" \"[S3], I think,\" said [A].", "\"{Let us|We should} look {slowly|together|one place at a time},\" said [B].", "\"Do not worry. Four eyes see more than two,\" said [B]."]],
        [["{So they|Together they|The two friends} went back and looked [s3].", "They searched {here and there|high and low}, until [B] looked [s3].", "[A] took a deep breath and {looked|walked over to look} [s3]."],
         ["And there {it was|lay the [O]|was the [O]}, {safe and sound|a little dusty but not broken|just where it had fallen}!", "\"{Here it is|I see it|Look}!\" {shouted|called|cried} [B]. There {was|lay} the [O]."],
         ["[A] {jumped for joy|laughed with joy|held the [o] tight}.", "[A] was so {happy|glad} that [he] {danced|jumped up and down|could hardly speak}."], ["<THANK>"]],
        [["<LESSON>"], ["<CLOSE>", "That night, the [O] {lay|stayed} {safely |}{next to [his] bed|beside [his] pillow}, and [A] slept well.", "From then on, [A] {tied a string to the [o]|kept the [O] in a safe place|always checked twice for [his] [o]}."], ["<FIN>"]],
    ],
}

PLOTS["found_object"] = {
    "lessons": ["honesty is worth more than any treasure", "doing the right thing feels better than keeping what is not ours", "an honest heart makes new friends",
                "what we find may be dear to someone else", "it is always right to return what belongs to another"],
    "memory": ["the day [he] found the [O]", "how happy [B] was to have the [O] back", "the [O] and its owner"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"]],
        [["<DAY>"], ["{There|Suddenly}, [s1], {something caught [his] eye|[he] saw something {strange|unusual}}. It was a [O]!", "While [he] was {playing|walking along|looking around}, [he] found a [O] [s1].", "[S1], [A] found a [O]."],
         ["\"How {lovely|pretty|wonderful}!\" {said|whispered} [A]. \"{I wish I could keep it|I have always wanted a [o]}.\"", "[A] {picked it up and turned it over|looked at it from all sides}. It was the {finest|nicest} [o] [he] had ever seen.", "[A] wanted to keep it {very much|at once}."],
         ["[He] could already {imagine|see} [himself] with it: [he] would [use].", "How nice it would be to [use]!", "With a [o] like that, one could [use].", ""]],
        [["But then [he] {began to think|stopped and thought}. {Somebody must have lost it|Someone might be looking for it}.", "But the [o] {had to belong|must belong} to someone. {Perhaps that someone was sad now|[A] did not feel right}."],
         ["[A] {went to ask|asked} [Ei]. \"{Is this [o] yours|Do you know whose [o] this is}?\"", "On the path, [he] met [Ei]. \"I found this [O] [s1],\" said [A]. \"{Do you know who lost it|Is it yours}?\""],
         ["\"{No, it is not mine|I am afraid I do not know},\" said [E], \"but {I saw someone crying|I heard someone looking for something} [s2].\"", "\"Hmm,\" said [E]. \"{You could keep it and say nothing|Nobody would know if you kept it}. What {will you do|does your heart say}?\" \"I will find the owner,\" said [A]."],
         ["[A] thanked [E] and {hurried on|walked on}.", ""]],
        [["[S2], [A] {found|saw|met} [Bnew], who {was crying|looked very sad|was searching the ground}.", "Soon [he] {saw|met} [Bnew] [s2]. {Big tears ran down [bhis] face|[Bhe] looked very unhappy}."],
         ["\"{What is wrong|Why are you sad}?\" asked [A]. \"I lost my [O],\" said [B]. \"{My [brel] gave it to me|It was a present from my [brel]}.\"", "\"Have you seen a [O]?\" asked [B]. \"{I have lost mine|I dropped it somewhere}, and {my [brel] made it for me|it is the only one I have}.\""],
         ["[A] {held out|showed [bhim]} the [O]. \"{Is this it|Is it this one}?\" [he] asked.", "For a moment, [A] was {quiet|silent}. Then [he] {gave|handed} [B] the [O]. \"I think this is yours,\" [he] said."],
         ["[B]'s eyes {lit up|shone}. \"{Yes! Thank you|You found it}!\" [bhe] {cried|said}.", "\"{My [o]|That is it}!\" {cried|shouted} [B] and {hugged [him]|danced around}."]],
        [["\"{Would you like to play with me|Shall we play with it together}?\" asked [B]. And so they {played|did} until the evening.", "To say thank you, [B] {shared [bhis] lunch with [A]|let [A] play with the [o] all afternoon|gave [A] a {big hug|smooth blue stone}}.", "From then on, the two of them {shared|played with} the [O] {together|every day}."],
         ["<LESSON>"], ["<CLOSE>", "[A] {had no [O] of [his] own|went home without the [o]}, but [he] had {found something better: a friend|a new friend, and that was better}."], ["<FIN>"]],
    ],
}

PLOTS["sharing"] = {
    "lessons": ["food tastes better when it is shared", "sharing makes two hearts happy", "what we give comes back to us", "a little is enough when it is shared", "a generous friend is never alone"],
    "memory": ["the picnic with [B]", "how they had shared [food]", "the day [he] shared [food] with [B]"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"], ["One [wday] {day|morning}, [P] {made|gave} [him] [foodfull]. \"{Do not eat it all at once|Enjoy it},\" said [P].", "[P] had {packed|given} [him] [foodfull] for the day.", "That {day|morning}, [he] was carrying [foodfull] from [P]."]],
        [["[A] {took|carried} [food] to [place]. [wx]", "\"I will eat [food] [pin],\" {thought|said} [A], and off [he] went. [wx]"], ["[He] sat down [s1] and {smiled|got ready to eat}.", "[He] found a {nice|quiet} spot [s1].", "[S1], [he] {sat down|made [himself] comfortable}."],
         ["Just {then|as [he] was about to take the first bite}, [Bfriend] came {by|along}. [Bhe] looked {tired and hungry|very hungry}.", "Then [he] heard a small {sigh|sound}. [Bfriend] was {standing|sitting} {there|close by}, {looking at [food]|with nothing to eat}."],
         ["\"{That smells so good|That looks delicious},\" said [B]. \"{I forgot my lunch|I have had nothing to eat all day}.\"", "\"May I have {some|a little}?\" asked [B] {softly|quietly}. \"{I am so hungry|My lunch fell into the mud}.\""]],
        [["[A] {held [food] tight|pulled [food] closer}. \"{It is mine|There is not enough for two},\" [he] {said|thought}.", "[A] did not want to share. \"I am hungry too,\" [he] {said|mumbled}.", "At first, [A] {said nothing|looked away|did not answer}. [He] {wanted|had planned} to eat everything alone."],
         ["[B] {nodded sadly|lowered [bhis] head|said nothing} and {turned to go|sat down [s2]}.", "\"I understand,\" said [B], and [bhe] {went|walked} away {slowly|with a sad face}."],
         ["[A] {took a bite|tasted [food]}, but {somehow it did not taste good|it did not taste as good as [he] had hoped}.", "But when [A] started to eat, [he] {had a heavy feeling inside|could not enjoy it}. [He] thought of [B]'s sad eyes."],
         ["[He] remembered {that [B] had once helped [him]|how [B] had always been kind to [him]|what [P] always said about friends}.", ""]],
        [["\"[B], wait!\" {called|shouted} [A]. \"{Come and sit with me|Please come back}. {There is enough for both of us|Half is for you}.\"", "[A] {jumped up and ran after [B]|stood up and walked over to [B]}. \"I am sorry,\" [he] said. \"{Let us share|Please have half}.\""],
         ["{So they sat down together|They sat side by side} {and ate [food]|and shared [food]}{, and every bite tasted wonderful|, and they talked and laughed|}.", "[A] {gave [B] half|divided everything into two equal parts}, and they ate {together|until they were full} and looked at [sight1]."],
         ["\"This is the best {meal|lunch} {of my life|I have ever had}!\" said [B].", "\"You are a good friend, [A],\" said [B].", ""],
         ["{The next day|A few days later|A week later}, [A] forgot [his] lunch. And who came along? It was [B], with [food2full]. \"Now it is my turn to share,\" [bhe] said.", "{The next day|A week later}, [B] {came to [A]'s home|knocked on [A]'s door} with [food2full]. \"{This is for you|Now I want to share with you},\" [bhe] said.", ""]],
        [["<LESSON>"], ["<CLOSE>"], ["<FIN>"]],
    ],
}

PLOTS["fear"] = {
    "lessons": ["being brave means trying even when you are afraid", "small steps can lead far", "fear grows small when a friend is near", "courage grows a little every day", "most things are less scary when you look at them closely"],
    "memory": ["the day [he] was not afraid of [fear] anymore", "how [B] had helped [him] to be brave", "[his] brave day"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"], ["But [A] was afraid of [fear].", "There was only one thing [he] did not like: [fear]. It {scared|frightened} [him].", "[He] was not afraid of much, but [he] was {very|terribly} afraid of [fear]."],
         ["[His] friends {did not know|knew nothing about it}, and [he] was {too shy|ashamed} to tell them.", "Even {thinking|the thought} of it made [his] heart beat fast.", ""]],
        [["One [wday] day, [A] was [pin] with [Bfriend].", "One {day|afternoon}, [A] and [Bfriend] {went to|were playing near} [place]. [wx]"], ["<BDESC>"], ["[fmoment].", "Then it happened. [fmoment]."],
         ["[A] {began to shake|turned pale|hid [s1]}. \"I cannot do this,\" [he] {whispered|said}.", "\"I want to go home,\" said [A] {in a small voice|with tears in [his] eyes}.", "[A] {could not move|froze}."],
         ["[B] did not laugh. \"{I was once afraid too|Everyone is afraid of something},\" [bhe] said. \"{We can try it together|I will stay with you|Let us take one small step}.\"",
          "\"Are you afraid of [fear]?\" asked [B] {gently|kindly}. [A] nodded. \"{That is all right|There is nothing wrong with that}. {I will help you|We will go slowly},\" said [B]."]],
        [["So [A] tried. [fstep1].", "First, they started small. [fstep1].", "[A] took a deep breath. [fstep1]."], ["It was {hard|not easy}, but {nothing bad happened|[he] did it}.", "\"{Well done|Very good|That is it},\" said [B].", "[His] heart {was still beating fast|beat like a drum}, but [he] did not {give up|run away}."],
         ["Next, [he] was a little braver. [fstep2].", "Then came the next step. [fstep2].", "\"Now {a little more|the next step},\" said [B]. [fstep2]."],
         ["And {then|at last|suddenly}, [fresult]!", "[A] could hardly believe it: [fresult]!", "{Before [he] knew it|After a while}, [fresult]."]],
        [["\"I did it!\" {shouted|cried|said} [A]. \"{I am not afraid anymore|It is not so bad at all}!\"", "\"Look at me, [B]!\" {called|shouted} [A]{, and [he] laughed out loud|}.", "[A] {laughed|smiled}. \"{I never thought I could do that|It was only scary at first},\" [he] said."],
         ["\"I {knew you could do it|am proud of you},\" said [B].", "[B] {clapped|cheered} {loudly|for joy}.", "<THANK>"]],
        [["<LESSON>"], ["<CLOSE>", "And the next time someone was afraid of [fear], it was [A] who {held their hand|helped}."], ["<FIN>"]],
    ],
}

PLOTS["stuck"] = {
    "lessons": ["together we can reach higher than alone", "every problem has an answer when friends think together", "it is good to ask for help", "a good idea is better than strong arms", "teamwork makes hard things easy"],
    "memory": ["the day the [O] got stuck in the tree", "how they had saved the [O]", "the [O] up in the tree"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"], ["[He] had a [O] {from [P]|that [he] loved}, and [he] loved to [use].", "[P] had {made|bought} [him] a [O].", "[A] had a [O]. It was {brand new|[his] favorite thing}."]],
        [["One windy {day|morning|afternoon}, [A] {took the [o] to|went with the [O] to} [place].", "<DAY> [A] had the [O] with [him]."],
         ["Suddenly, a {strong|big} {gust of wind|wind} {came|blew} and carried the [o] {away|off}. Up, up, up it went, until it {got stuck|was caught} in a tall tree.", "All at once, the wind {grabbed|snatched} the [O] and {threw|blew} it high into a tree. There it {stayed|hung}.",],
         ["\"Oh no, my [o]!\" {cried|shouted} [A].", "\"Come back!\" {cried|called} [A], but the [o] did not move.", "[A] looked up and {did not know what to do|wanted to cry}."]],
        [["First, [he] jumped {as high as [he] could|up and down}, but the branch was {much |far |}too high.", "[He] tried to climb the tree, but [he] {slid down again|could not reach the first branch}.", "[He] shook the {trunk|tree}, but only {leaves|a few twigs} fell down."],
         ["Then [he] tried a long stick, but {it was too short|it broke in two}.", "Then [he] threw a {small stone|pine cone}, but it {missed|flew past}.", ""],
         ["[Bfriend] {came along|saw what had happened}. \"{May I help|Can I help you|Do you need help}?\" [bhe] asked.", "\"{Who can help me|What can I do now}?\" [A] {sighed|said}. \"{I can|Perhaps I can}!\" It was [Bfriend]."],
         ["\"My [O] is stuck {up there|in the tree},\" said [A].", "[A] pointed {up |}at the [O]. \"{It is too high for me|I cannot reach it}.\""]],
        [["[B] {thought for a moment|looked up and thought}. \"I have an idea,\" [bhe] said.", "\"Hmm,\" said [B]. \"{Alone we are too small|One of us is too small}, but together we are {tall|big}!\""],
         ["[B] {climbed onto|stood on} [A]'s shoulders and {stretched|reached} up {as far as [bhe] could|with the stick}.", "They {asked|called} [Ei] to bring a ladder. [A] held it {tight|steady}, and [B] climbed up.", "They tied two long sticks together, and [A] lifted them {high|up} while [B] {told [him] where to push|pointed the way}.", "They pulled {down the branch|the branch down} with a rope, and [A] {held on|held the rope} while [B] reached up."],
         ["{Slowly, slowly|Little by little|After three tries}, the [o] {came loose|moved}. Then it {dropped|floated|fell} down, right {into [A]'s arms|at their feet}!", "\"{Almost|A little more},\" {called|said} [A]. \"Now!\" And {down came the [O]|the [O] was free}!"],
         ["<THANK>"], ["\"Now let us {play|have fun} with the [o] together,\" said [A], and they did {until evening|all afternoon}.", "They {laughed|cheered} and {took turns with|played with} the [O] {until the evening|for the rest of the day}."]],
        [["<LESSON>"], ["<CLOSE>"], ["<FIN>"]],
    ],
}

PLOTS["build"] = {
    "lessons": ["it is all right to fail, as long as you try again", "patience is the best tool", "every mistake teaches us something", "good things take time", "two heads are better than one"],
    "memory": ["the day they built the [build]", "the [build] that had failed twice", "[his] very own [build]"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"], ["[A] had a big {dream|plan}: [he] wanted to build a [build].", "More than anything, [he] wanted to {build|make} a [build]."]],
        [["One [wday] {day|morning}, [he] {gathered|collected} [materials] and {went to|carried everything to} [place].", "<DAY> [He] {had brought|brought} [materials] along."],
         ["\"Today I will build {the best [build] in the world|my [build]},\" {said|thought} [A].", "[He] worked {all morning|very hard|for hours}."],
         ["But [bfail1].", "But {when it was nearly done|after an hour|as soon as [he] let go}, [bfail1].", "Then, {oh dear|crash}, [bfail1]!"],
         ["\"Oh no!\" said [A]. \"{I will try again|One more time}.\"", "[A] was {disappointed|upset}, but [he] {started again|tried once more}."],
         ["The second time, [bfail2].", "{In the afternoon|After lunch}, [he] tried again, but [bfail2].", "[He] tried another way. This time, [bfail2]."]],
        [["[A] {sat down|dropped down} [s1] and {sighed|put [his] head in [his] [hands]}. \"{I will never finish it|I cannot do it},\" [he] said.", "\"{It is no use|I give up},\" said [A], and [he] sat down [s1]."],
         ["[Bfriend] {had been watching|came by} and {sat down next to [him]|asked what was wrong}.", "Then [Bfriend] {stopped|came over} and looked at the {broken |}[build]."],
         ["\"You {are almost there|have done so much already},\" said [B]. \"{Let us find out what went wrong|Let us think first and build after that|We can look at it together}.\"",
          "\"My [brel] {says|always says} that {every builder fails at first|haste makes waste},\" said [B]. \"{May I help you?|Let me help you.}\""],
         ["{They drew a plan in the sand|They drew a picture of the [build]|They made a list of what they needed}. [A] held the pieces, and [B] {put them together|tied the knots|handed [him] the [materials]}.", "This time they worked {slowly|step by step} and {checked every part|tested every piece}. [B] {held|carried} the [materials], and [A] put everything in its place."]],
        [["{When the sun was low|At last|By the end of the day}, the [build] was {finished|done|ready}, and [buse].", "And it worked! The [build] {was perfect|was even better than [he] had dreamed}, and [buse]."],
         ["\"We did it!\" they {shouted|cried}.", "\"{It is beautiful|It is the best [build] ever}!\" said [B].", "<THANK>"], ["[P] came to see it and {clapped|was amazed|could hardly believe it}.", ""]],
        [["<LESSON>"], ["<CLOSE>", "[A] painted {a sign|two names} on the [build]. The letters said \"[A] and [B]\"."], ["<FIN>"]],
    ],
}

PLOTS["new_friend"] = {
    "lessons": ["a friendly word can open any door", "a new friend may be waiting just around the corner", "kindness is the beginning of friendship", "nobody should have to play alone", "it is worth being the first to say hello"],
    "memory": ["the day [he] met [B]", "[his] first game of [game] with [B]", "how [he] and [B] became friends"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"], ["But [A] had nobody to play with, and sometimes [he] {was|felt} {lonely|a little sad}.", "[He] had many toys but no {friend|friends} to share them with.", "\"I wish I had a friend,\" [he] {often|sometimes} said to [P]."],
         ["[His] {only|best} toy was a [O].", "[He] spent [his] days with [his] [O].", ""]],
        [["<DAY>"], ["There [he] saw [Bnew], {sitting all alone|who was all alone}.", "There [he] {noticed|saw} [Bnew] [s1]. [Bhe] {looked shy|was drawing in the dust|was all alone too}."],
         ["[A] wanted to say hello, but [he] was {shy|nervous}. {What if [B] did not like [him]|What should [he] say}?", "At first, [A] {hid|stood} [s2] and {only watched|did not dare to speak}.", "[A] took a {deep breath|few steps} and {walked over|went closer}."],
         ["{Then|But then|At last} [he] {thought of [P]'s words: a smile costs nothing|gathered all [his] courage}. \"{Hello|Hi}! My name is [A],\" [he] said. \"What is your name?\"", "\"{Hello|Good day},\" {said [A]|[he] said}. \"I am [A]. {Are you new here|Do you live near here}?\""],
         ["\"I am [B],\" said [bthe] [bnoun] {quietly|softly|with a shy smile}. \"{We moved here yesterday|I do not know anyone here}.\"", "[Bthe] [bnoun] looked up. \"My name is [B],\" [bhe] {said|answered}. \"{I just moved here, and I have no friends yet|I am new in this place}.\""]],
        [["\"{Do you want|Would you like} to play [game] {with me|}?\" asked [A].", "[A] {showed|held out} [his] [O]. \"{Look what I have!|Do you like it?} {We can play with it together|You may try it},\" [he] said."], ["[B]'s {face|eyes} lit up. \"{Yes, please|I would love to}!\" [bhe] {said|cried}.", "<YES>"],
         ["They played [game] and {laughed|ran around} until they were out of breath.", "First they played [game], and then they {looked at [sight1]|rested [s2]|shared [foodfull]}.", "They {raced|ran} around [place], played [game] and looked at [sight2]."],
         ["[B] showed [A] how to {whistle with a blade of grass|make a crown of leaves|walk on [bhis] heels|tell a story with shadows}.", "\"You are {so much fun|very good at [game]},\" said [B].", ""]],
        [["When it was time to go home, [B] asked, \"{Will you come again tomorrow|Can we play again tomorrow}?\"", "[Wxend], they had to {say goodbye|go home}. \"{See you tomorrow|Until tomorrow}?\" asked [B]."], ["\"{Of course|Yes, and every day after that},\" said [A]. \"We are friends now.\"", "\"I will be here,\" {promised|said} [A]."]],
        [["<LESSON>"], ["<CLOSE>", "After that, [A] was never lonely again.", "From then on, you could see [A] and [B] [pin] every {day|afternoon}, {playing [game]|laughing together}."], ["<FIN>"]],
    ],
}

PLOTS["lost_baby"] = {
    "lessons": ["helping someone small can be a big deed", "a kind heart always finds a way", "no one is too small to help", "when we help others, we feel happy too", "home is where someone waits for you"],
    "memory": ["the little [baby]", "the day [he] brought the [baby] home", "how the [baby] found its mother"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"]],
        [["<DAY>"], ["{Suddenly|Then|After a while}, [he] heard a {soft|tiny|sad} cry. [He] looked [s1] and found a little [baby].", "[S1], [he] {found|saw} a {tiny|little} [baby], all alone and {shivering|crying}."],
         ["\"{Poor thing|Oh, you poor little one}!\" said [A]. \"{Where is your mother|Have you lost your mother}?\"", "\"{Do not cry|Do not be afraid},\" {whispered|said} [A]. \"I will help you find your mother.\""],
         ["The [baby] {looked up with big eyes|only cried louder|came a little closer}.", "The [baby] {pressed itself against [him]|hid behind [his] legs}."]],
        [["[A] wrapped the [baby] in [his] scarf and {set off|went to look}.", "[A] gave the [baby] {some water|a bit of [his] lunch} and {picked it up|carried it} {gently|carefully}."],
         ["On the way, [he] met [Bfriend]. \"Have you seen a mother [parent]?\" asked [A]. \"{No|Not today}, but I will {help you look|come with you},\" said [B].", "[Bfriend] {came along|joined [him]}. \"{We will find its mother|Let us search together},\" said [B]."],
         ["They looked [s2], but {there was no [parent]|nobody was there}.", "They asked [Ei]. \"I {heard|saw} a [parent] near the [where] {this morning|an hour ago},\" said [E]. \"{She was calling and calling|She looked very worried}.\"", "They {searched|walked} for a long time and asked everyone they met."],
         ["The [baby] grew tired, {so they took turns carrying it|and [A] sang to it softly}.", "\"We must not give up,\" said [A].", ""]],
        [["{At last|Finally}, near the [where], they heard a {loud|worried} call. It was {the|a} mother [parent]!", "{Then|At last}, they came to the [where]. There was {the|a} mother [parent], {looking everywhere|running up and down}."],
         ["The [baby] {gave a happy cry|jumped down} and {ran|hurried} {to her|to its mother} {as fast as it could|}.", "When the mother saw her little [baby], she {cried for joy|ran to it at once}."], ["The two {snuggled close together|pressed their heads together}.", "She looked at [A] and [B] as if to say thank you.", ""],
         ["\"{Look how happy they are|Now it is safe},\" said [B].", "[A] {felt|was} {warm and happy inside|so happy that [he] had tears in [his] eyes}."]],
        [["<LESSON>"], ["<CLOSE>", "{After that|From then on}, the [baby] {came to greet [A]|ran to meet [him]} whenever [he] came to [place]."], ["<FIN>"]],
    ],
}

PLOTS["broken"] = {
    "lessons": ["telling the truth is always better than hiding", "a mistake is not so bad when you tell the truth", "honest words make a heavy heart light", "broken things can be mended, and so can trust", "it takes courage to say sorry"],
    "memory": ["the broken [brk]", "the day [he] told the truth", "how they had mended the [brk]"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"], ["At home, [P] had a {beautiful|pretty} [brkadj] [brk]{. It was very old| that stood on the shelf|}.", "[P] had a [brkadj] [brk] that [phe] {loved|liked very much}."]],
        [["One [wday] {day|afternoon}, [A] was playing [game] {in the house|inside} with [Bfriend].", "One {rainy|windy} {day|afternoon}, [A] and [Bfriend] played with a [O] {in the house|inside}."], ["They {ran|jumped} {around the table|from room to room}{, laughing and shouting|}.", ""],
         ["{Suddenly|Then}, [A] bumped into the shelf. {Crash|Bang}! The [brkadj] [brk] fell {down|to the floor} and broke.", "{All at once|Then} there was a loud crash. [A] had knocked over the [brkadj] [brk], and it {lay in pieces|was broken}."],
         ["\"Oh no!\" {whispered|said} [A]. \"{What will [Pcall] say?|[Pcall] will be so sad.}\"", "[A] {stood very still|turned pale}. \"{What shall I do|What now}?\" [he] {whispered|asked}."]],
        [["[A] {quickly |}hid the pieces {under the bed|in a box|behind the door}. \"{Nobody will know|Do not tell anyone},\" [he] said to [B].", "\"{We could say it was the cat|Maybe the wind did it},\" said [A]. [He] {swept|pushed} the pieces {under the rug|behind a chair}."],
         ["[B] shook [bhis] head. \"{I think you should tell the truth|That does not feel right},\" [bhe] said.", "\"Are you sure?\" asked [B]. \"{A secret like that is heavy|[Pcall] would want to know}.\""],
         ["At {dinner|supper}, [A] could not eat. [His] {stomach|heart} felt {heavy|like a stone}.", "All {evening|afternoon}, [A] {could think of nothing else|was very quiet}."], ["\"Is something wrong, {dear|my dear}?\" asked [P].", "\"You are so quiet today,\" said [P]. \"{What is the matter|Are you ill}?\""]],
        [["[A] {took a deep breath|began to cry}. \"I broke the [brk],\" [he] said. \"{I was running in the house, and I hid the pieces|It was an accident}. I am {so |very |}sorry.\"", "\"{It was me|I did it}!\" {cried|said} [A]. \"I broke your [brkadj] [brk] and hid it. {I am sorry|Please forgive me}.\""],
         ["[P] was {quiet|silent} for a moment. Then [phe] {smiled|hugged [him]}. \"{Thank you for telling me the truth|I am glad that you told me},\" [phe] said. \"{You matter more than any [brk]|A [brk] can be mended}.\"", "[P] {hugged|took} [A] {close|in [phis] arms}. \"{I am sad about the [brk], but I am proud of you|That was brave of you},\" [phe] said."],
         ["Together, they {glued|put} the pieces {back |}together. It took {all evening|a long time}, but {at last|in the end} the [brk] was whole again.", "The next day, [A] and [B] {worked in the garden|washed the dishes|helped [P]} and mended the [brk] with {glue|care and glue}. You could {still |hardly |}see the cracks."]],
        [["<LESSON>"], ["<CLOSE_HOME>", "The [brk] {had a crack now|stood on the shelf again}, and every time [A] saw it, [he] {remembered|thought of} [memory]."], ["<FIN>"]],
    ],
}

PLOTS["garden"] = {
    "lessons": ["good things take time", "patience makes things grow", "a little care every day works wonders", "what we look after will grow", "waiting is easier when you do it together"],
    "memory": ["the tiny seed", "the [plant] that grew so {slowly|well}", "the day the first green leaf came up"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"]],
        [["One [wday] day, [Ei] gave [him] a tiny {brown |}seed. \"{Plant it and be patient|If you take care of it, something wonderful will grow},\" said [E].", "One {day|morning}, [A] helped [Ei]. To say thank you, [E] gave [him] a {small|little} seed. \"{It will become a [plant]|It looks like nothing now, but wait and see},\" [ehe] said."],
         ["[A] {ran|hurried} to [place] and {dug|made} a little hole [s1]. [He] put the seed in, covered it {with soft earth|gently} and gave it water.", "[A] went to [place], planted the seed [s1] and watered it {from a small can|with great care}."],
         ["\"Grow, little seed!\" [he] {whispered|said}.", "[He] {put|placed} a ring of {stones|shells} around {it|the spot}.", ""]],
        [["The next {day|morning}, [he] {ran|went} to look. {Nothing|There was nothing but brown earth}.", "Every {day|morning}, [he] came to look, but {there was nothing to see|nothing happened}."], ["A week {passed|went by}. {Still nothing|The earth was bare}.", "Three days passed, then five, then ten. {Nothing grew|Still nothing}.", ""],
         ["\"{This seed is no good|It will never grow},\" {said|grumbled} [A]. [He] wanted to dig it up.", "[A] {stamped [his] foot|sat down and sighed}. \"{I am tired of waiting|It takes so long},\" [he] said."],
         ["\"Wait!\" said [Bfriend], who {had come to help|was passing by}. \"{Seeds work in secret|Under the ground, the seed is busy}. {Give it a little more time|Let us water it together}.\"", "But [Bfriend] {stopped [him]|shook [bhis] head}. \"{If you dig it up, it can never grow|My [brel] says that roots come first},\" [bhe] said. \"{Let us wait together|Give it time}.\""],
         ["So they watered it {every day|in the morning and in the evening} and told it {stories|jokes}.", "So [A] waited. [He] and [B] {pulled out the weeds|sang to the seed|chased away the snails} and gave it water."]],
        [["Then, one [wday] morning, {something green was there|a tiny green leaf peeked out of the earth}! \"{Look, look|[B], come quickly}!\" {shouted|cried} [A].", "And one morning, {there it was: a small green shoot|the earth cracked, and a green tip came out}. [A] {danced for joy|could not stop smiling}."],
         ["It grew and grew. {By the end of summer|After some weeks|A few weeks later}, it was a {fine|splendid} [plant], [plantsize].", "Day by day it grew, until it was a {big|lovely} [plant], [plantsize]."],
         ["[E] came to {see|admire} it. \"{You have waited well|You took good care of it}, [A],\" [ehe] said.", "[A] {showed it to everyone|invited everyone to see it}, and [E] was {very |}proud of [him].", ""], ["[A] gave the first seeds {of the [plant] |}to [B], so that [bhe] could plant one too.", ""]],
        [["<LESSON>"], ["<CLOSE>"], ["<FIN>"]],
    ],
}

PLOTS["gift"] = {
    "lessons": ["the best gifts come from the heart", "a gift does not have to cost money", "love is the best part of any present", "the time we give is the nicest gift"],
    "memory": ["the birthday surprise", "the [O] that [he] had made", "how happy [P] was about the [O]"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"], ["Tomorrow was [P]'s birthday, and [A] {had no present|did not have a gift yet}.", "It was nearly [P]'s birthday. [A] wanted to give [phim] {something special|the best present in the world}."]],
        [["[A] {emptied [his] piggy bank|looked in [his] pocket}, but there {was only one small coin|were only two small coins}. {That was not enough|What could [he] buy with that}?", "But [A] had {no|very little} money. {What could [he] do|How could [he] find a gift}?"],
         ["{So [he] went|[He] went} to [place] to think. [wx]", "[He] {walked|went} to [place] and {thought and thought|sat down to think}. [wx]"], ["First, [he] picked some flowers, but {a goat ate them|they wilted in the heat|the wind blew them away}.", "First, [he] tried to bake a cake, but it {burned|was as hard as a stone}.", "First, [he] wanted to write a poem, but {the words did not come|[he] could not find a rhyme}."],
         ["\"{I will never find a present|It is hopeless},\" [he] {sighed|said}.", ""]],
        [["Then [Bfriend] came by. \"{Why do you look so sad|What are you thinking about}?\" [bhe] asked.", "[S1], [he] met [Bfriend] and told [bhim] {everything|about the birthday}."],
         ["\"Tomorrow is the birthday of my [Pword], and I have no present,\" said [A]. \"What does [phe] like {best|most}?\" asked [B]. [A] thought for a moment. \"[Phe] {lost|once had} a [O] that [phe] loved. I could make a new one!\" [he] said.", "\"I have no present for my [Pword],\" said [A]. \"Why do you not make something {yourself|with your own [hands]}?\" asked [B]. [A]'s eyes {lit up|shone}. \"I could make a [O]!\" [he] said. \"[Phe] always wanted one.\""],
         ["\"Then {make it|let us make it together}!\" said [B]. \"I {will help you|have some things at home that you can use}.\"", "\"{That is a wonderful idea|What a good idea}!\" said [B]."],
         ["{They worked all afternoon|They cut and glued and painted}. {Sometimes things went wrong, but they kept going|[A] put [his] whole heart into it}. {At last|In the evening}, the [O] was {finished|ready}.", "They found what they needed [s2] and went to work. [B] held the pieces, and [A] put them together, until the [O] was {done|ready}."]],
        [["The next {day|morning}, [A] {gave [P] the present|held out the present}. \"Happy birthday!\" [he] said.", "On the birthday, [P] {opened|unwrapped} the {little |}parcel {slowly|with care}."], ["[P] looked at the [O], and tears came to [phis] eyes. \"{You made this for me|Did you make this yourself}?\" [phe] asked.", "\"A [O]!\" cried [P]. \"It is the {most beautiful|best} present I have ever had!\""],
         ["[A] nodded {proudly|shyly}. \"[B] helped me,\" [he] said.", "\"{It is not perfect|It is only small},\" said [A], \"but it is made with love.\""], ["[P] {hugged|kissed} [him] and {put the [O] in the best place in the house|showed it to everyone}.", "They {ate|shared} [foodfull] and sang {songs|birthday songs} with [B] until {late|the stars came out}."]],
        [["<LESSON>"], ["<CLOSE_HOME>"], ["<FIN>"]],
    ],
}

PLOTS["noise"] = {
    "lessons": ["strange things are often harmless when you look at them closely", "it is better to look than to worry", "questions are braver than running away", "fear makes small things look big", "a curious mind is a brave one"],
    "memory": ["the mystery of the {strange |}noise", "the day they had heard [noise] [pin]", "how brave they had been"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"]],
        [["One [wday] {evening|day}, [A] and [Bfriend] were [pin].", "<DAY> [He] met [Bfriend] there."], ["They were playing [game] when they heard [noise].", "{Suddenly|All at once}, there was [noise].", "[Sight] But then they heard [noise]."],
         ["\"What was that?\" {whispered|asked} [A].", "\"Did you hear that?\" asked [A]. \"Y-yes,\" said [B]."], ["\"{Maybe it is a monster|It could be a ghost},\" said [B], and [bhe] {hid [s1]|grabbed [A]'s arm}.", "\"{I think it is a giant|Perhaps it is a wild animal},\" {whispered|said} [B] and {trembled|held on to [A]}.", "They {looked at each other|stood very still}. Nobody dared to move."]],
        [["\"{Let us run home|We should run},\" said [B]. \"No,\" said [A]. \"{I want to know what it is|First I want to see what makes that sound}.\"", "[A] was {afraid too|also scared}, but [he] was {even more curious|more curious than afraid}."],
         ["{Slowly|On tiptoe}, they {went|crept} closer. They looked [s1]. {Nothing|There was nothing to see}.", "[A] took [his] [O] for {luck|courage}, and they {looked|went to look} [s1]. {There was nothing|Nobody was there}."],
         ["There it was again: [noise]! It came {from nearby|from very close}.", "The {sound|noise} grew louder. It {seemed to come|came} from {a dark corner|close by}.", ""], ["\"Hold my [hand],\" said [A]. \"{One, two, three|Together}!\"", "[A] {counted to three|took a deep breath}, and they {looked|peeked} [s2].", "[B] closed [bhis] eyes, but [A] looked [s2]."]],
        [["And what did they find? It was only [noiseis]!", "There, [s2], they found the answer. It was only [noiseis]."], ["[A] {began to laugh|burst out laughing}. \"{So that was our monster|That is our terrible ghost}!\" [he] said.", "They {laughed|giggled} until their {sides|bellies} hurt.", "\"{We were afraid of that|Is that all}?\" said [B], and they both laughed."],
         ["\"{I am glad that we did not run away|You were so brave},\" said [B].", "<THANK>", "When they told [Ei] about it, [ehe] laughed too and said that {most monsters are like that|[ehe] had been fooled by the same sound once}."]],
        [["<LESSON>"], ["<CLOSE>"], ["<FIN>"]],
    ],
}

PLOTS["race"] = {
    "lessons": ["being kind is more important than winning", "a friend is worth more than a prize", "the best winner is the one who helps", "it does not matter who is first when friends run together"],
    "memory": ["the great race", "the race that nobody lost", "how they had crossed the finish line together"],
    "paragraphs": [
        [["<OPEN>"], ["[A] was {very fast|a fast runner}, and [he] {was proud of it|liked to say so}.", "[He] could run faster than {anyone|the wind}, or so [he] said.", "<TRAIT> Above all, [he] loved to run."]],
        [["One [wday] day, there was a {big |}race [pin]. The prize was a [O].", "Every year, there was a race [pin], and the winner got a [O]. [wx]"], ["\"I will win {that|the [O]|the race}!\" said [A]. \"{Nobody is faster than me|Then I can [use]}.\"", "[A] wanted that [O] {very much|more than anything}."],
         ["[His] friend [B] wanted to run too. \"{I will do my best|I just like to run},\" said [B].", "[Bfriend] {also wanted|wanted} to run. \"{You are too slow to win|You will never beat me},\" said [A]. [B] only smiled."],
         ["\"Ready, set, go!\" {called|shouted} [E2i].", "[E2i] {waved a flag|rang a bell}, and {off they went|the race began}!"]],
        [["[A] {shot ahead|ran like the wind}. Soon [he] was far in front.", "At first, [A] was in front, and [B] was {right behind [him]|not far behind}."], ["They {ran|raced} {faster and faster|around every corner|past the crowd}.", "", "The people along the way {cheered|clapped}."],
         ["Then [he] heard a cry. [A] looked back. [B] had {tripped over a root|fallen} and {was holding [bhis] {knee|leg}|could not get up}.", "Near the end, [A] heard a {cry|thump} behind [him]. [B] {had fallen and hurt [bhis] {knee|leg}|lay on the ground}."],
         ["The finish line was {so close|just ahead}. {If [he] stopped now, [he] would lose|[He] could already see the prize}.", "[A] looked at the finish line, and then [he] looked at [B]. It was a hard choice."]],
        [["[A] {stopped|turned around} and ran back. \"{Are you hurt|Does it hurt}?\" [he] asked.", "But a friend was a friend. [A] {turned around|ran back} and {knelt down|bent down} beside [B]. \"{Lean on me|Come, I will help you},\" [he] said."], ["\"{Go on, or you will lose!|What about the prize?}\" said [B]. \"{A race is only a race|You are more important than a [o]},\" said [A].", "\"You will lose the race,\" said [B]. \"{I do not care|That does not matter},\" said [A]."],
         ["{Arm in arm|Side by side|Step by step}, they walked {on|to the finish line}. The others had {arrived|finished} long ago, but {everyone|the whole crowd} {cheered|clapped} for them.", "[A] {helped|carried} [B] {all the way |}to the finish line. They were the last, but nobody {laughed|minded}. The crowd {cheered|clapped}."],
         ["[E2] came to them with the [O]. \"{The prize goes to the one with the biggest heart|This is for you},\" [e2he] said{, and gave it to [A]| to [A]}. \"{You showed us what matters|That was better than winning}.\"", "Someone else {had won|got} the [O], but [B] gave [A] {a hug|a crown of leaves}. \"{You are my hero|For me, you are the winner},\" [bhe] said."]],
        [["<LESSON>"], ["<CLOSE>"], ["<FIN>"]],
    ],
}

PLOTS["errand"] = {
    "lessons": ["no good deed is ever lost", "even the smallest friend can be a great help", "kindness comes back when we need it most", "those we help today may help us tomorrow"],
    "memory": ["the little [tiny]", "the walk to the house of [r2]", "how the [tiny] had {helped|saved} [him]"],
    "paragraphs": [
        [["<OPEN>"], ["<TRAIT>"], ["One [wday] {day|morning}, [P] gave [him] [foodfull] and said, \"Please take {this|it all} to your [r2word], who {is ill in bed|lives on the other side of [place]}.\""]],
        [["[A] {put on [his] hat|took the food} and {set out|went on [his] way}. {The path|The way} led past [place]. [wx]", "So [A] set out {at once|with a song on [his] lips}. [wx] [Sight]"], ["There [he] saw {a|a tiny} [tiny] {in trouble|that could not move}. Its [tinypart] was {stuck|caught} {under a stone|in a sticky web|between two twigs} [s1].", "On the way, [he] heard a tiny voice: \"Help, help!\" It was a [tiny]. Its [tinypart] was {stuck|caught} in a {sticky web|tangle of grass} [s1]."],
         ["\"{I am in a hurry|I do not have much time},\" {thought|said} [A], \"but I {cannot leave you like this|must help you}.\"", "[A] {stopped|put down the food} {at once|right away}."], ["{Very |}{carefully|gently}, [he] {freed|helped} the {little |}[tiny].", "With great care, [he] set the [tiny] free."],
         ["\"Thank you!\" said the [tiny]. \"One day I will help you too.\" [A] {smiled|laughed kindly}. \"{You are very small|That is nice of you},\" [he] said, and [he] {went on|walked on}."]],
        [["{Later|A little later|After a while}, a {thick|gray} fog came up, and [A] {lost [his] way|could not see the path anymore}.", "{Later|After a while}, it grew {dark|very dark}, and [A] {took a wrong turn|could not find the path}."], ["[He] walked {left and right|this way and that way}, but {everything looked the same|[he] only came back to the same spot}.", "\"{Where am I|Which way should I go}?\" [he] {asked|whispered}. Nobody answered.", ""],
         ["[A] sat down [s2] and {was close to tears|felt very small}.", "[He] {was cold and afraid|began to be afraid}."], ["Then [he] heard a {tiny|small} voice {near [his] ear|close by}. It was the [tiny]! \"{Follow me|I know the way},\" it said.", "\"{Do not be afraid|Now it is my turn},\" said a {tiny|small} voice. {The [tiny] had come back|It was the [tiny]}! \"I know every {stone|path} here. Follow me.\""]],
        [["{So [A] followed|[A] followed} the [tiny], step by step, until [he] saw {a light in a window|the door of a little house}. It was the home of [r2].", "The [tiny] led [him] past a {hollow tree|broken gate} and an old well, and soon they {came to|stood before} the house of [r2]."],
         ["\"{My dear [A]|[A]}, how {good|nice} to see you!\" said [r2]. {They ate [food] together|[A] gave [r2him] [food]}, and {[A] told [r2him] everything|even the [tiny] got a crumb}.", "[R2] was so {glad|happy} about [food] that [r2he] {felt better at once|laughed out loud}. The [tiny] got {a crumb too|the best crumb of all}."],
         ["\"So it was {the little [tiny]|a [tiny]} that brought you here,\" said [r2]. \"{Then it is a true friend|What a clever helper}.\"", ""]],
        [["<LESSON>"], ["That night, [A] {fell asleep|went to bed} and {dreamed of|thought about} [memory].", "And whenever [A] came back to [place], [he] {looked out for|said hello to} the [tiny].", "When [he] came home, [A] told [P] {all|everything} about [memory].", "\"What a day!\" said [P] when [A] told [phim] about [memory]."], ["<FIN>"]],
    ],
}
