# Answers the lab's questions over the second serial port, one line each: "TAG command argument" -> "TAG ok answer".
# It asks the role's real service (nginx, redis) over the guest's loopback, so that an answer proves that it works.
use strict; use warnings; no warnings "portable"; use IO::Socket::INET;
my ($role, $seed) = @ARGV;
my $KEYS = 3000;
my ($writer, $to_writer);
$| = 1;

# The same text for the same arguments, about `bytes` long; different seeds give different texts.
sub text {
    my ($n, $bytes) = @_;
    my $x = ($seed * 7919 + $n * 104729 + 12345) & 0x7fffffff;
    my $out = "";
    while (length $out < $bytes) { $x = ($x * 1103515245 + 12345) & 0x7fffffff; $out .= sprintf "%08x", $x; }
    return $out;
}
sub redis {
    my ($sock, @words) = @_;
    print $sock "*" . @words . "\r\n" . join "", map { "\$" . length($_) . "\r\n$_\r\n" } @words;
    my $head = <$sock> // die "redis closed the connection\n";
    $head =~ s/\r\n//;
    return substr $head, 1 if $head =~ /^[+:]/;
    die "redis says $head\n" if $head !~ /^\$(\d+)$/;
    read $sock, my $body, $1 + 2;
    return substr $body, 0, $1;
}
sub to { return IO::Socket::INET->new(PeerAddr => "127.0.0.1:$_[0]", Timeout => 10) // die "no answer on port $_[0]\n" }
sub sum { my ($h, $i) = (0, 0); $h = ($h * 31 + $_) & 0xffffffffffff for unpack "V*", $_[0] . "\0" x (-length($_[0]) % 4); return sprintf "%012x", $h }
sub page {
    my $s = to(80);
    print $s "GET /$_[0] HTTP/1.0\r\n\r\n";
    local $/;
    my $all = <$s>;
    die "nginx says " . substr($all, 0, 20) . "\n" unless $all =~ /^HTTP\/1.1 200 .*?\r\n\r\n(.*)$/s;
    return sum($1) . "." . length $1;
}
# Writes to memory at a bounded rate, and checks on each write that the page still holds what was written last.
sub write_pages {
    my ($rate, $pages) = @_;
    my $memory = text(1, 4096) x $pages;
    my @last = (0) x $pages;
    my ($n, $x) = (0, $seed + 1);
    open my $log, ">", "/run/writer" or die;
    while (1) {
        for (1 .. ($rate + 49) / 50) {
            $x = ($x * 1103515245 + 12345) & 0x7fffffff;
            my $p = ($x >> 8) % $pages;
            my $got = unpack "Q", substr $memory, $p * 4096, 8;
            if ($last[$p] && $got != $last[$p]) { syswrite $log, "page $p holds $got, not $last[$p]\n"; exit 1; }
            $last[$p] = ++$n;
            substr($memory, $p * 4096, 8) = pack "Q", $n;
        }
        sysseek $log, 0, 0; syswrite $log, sprintf "%012d\n", $n;
        select undef, undef, undef, 0.02;
    }
}
# Holds `mib` MiB of pages that all differ.
sub hold_pages {
    my ($mib) = @_;
    open my $r, "<", "/dev/urandom" or die;
    read $r, my $mb, 1 << 20;
    my @held;
    for my $n (0 .. $mib - 1) {
        my $m = $mb;
        substr($m, $_ * 4096, 8) = pack "Q", ($n << 8) + $_ + 1 for 0 .. 255;
        push @held, $m;
    }
    open my $log, ">", "/run/filled" or die;
    syswrite $log, scalar @held;
    sleep 100000 while 1;
}
sub slurp { open my $f, "<", $_[0] or return ""; local $/; return <$f> // "" }

if ($role eq "db") {
    my $s;
    for (1 .. 100) { $s = eval { to(6379) } and last; select undef, undef, undef, 0.2; }
    redis($s, "SET", "k$_", text($_, 512 + $_ % 1024)) for 1 .. $KEYS;
}
my %answer = (
    ping => sub { "pong" },
    who => sub { "$role $seed" },
    uptime => sub { (split " ", slurp("/proc/uptime"))[0] },
    page => sub { page($_[0]) },
    keys => sub { redis(to(6379), "DBSIZE") },
    key => sub { my $v = redis(to(6379), "GET", "k$_[0]"); die "wrong value\n" if $v ne text($_[0], 512 + $_[0] % 1024); sum($v) },
    check => sub {
        return join ",", map { page("p$_.html") } 0 .. 7 if $role eq "web";
        my $s; return sum(substr slurp("/srv/www/p3.html"), 0, 4096) if $role ne "db";
        $s = to(6379);
        my $all = redis($s, "DBSIZE");
        for (map { $_ * 37 + 1 } 0 .. 79) { my $v = redis($s, "GET", "k$_"); die "k$_ is wrong\n" if $v ne text($_, 512 + $_ % 1024); $all .= substr $v, 0, 2; }
        return "$KEYS:$all";
    },
    writer => sub {
        my ($rate, $pages) = @_;
        if ($writer) { kill 9, $writer; waitpid $writer, 0; $writer = 0; }
        return "stopped" unless $rate;
        $writer = fork // die "fork\n";
        if (!$writer) { write_pages($rate, $pages || 2048); exit 0; }
        return "started";
    },
    fill => sub { my ($mib) = @_; my $pid = fork // die "fork\n"; if (!$pid) { hold_pages($mib); exit 0; } return "started" },
    filled => sub { slurp("/run/filled") || "no" },
    written => sub { my $w = slurp("/run/writer"); chomp $w; die "$w\n" if $w =~ /page/; $w },
);
while (my $line = <STDIN>) {
    my ($tag, $what, @args) = split " ", $line;
    next unless defined $what;
    my $said = eval { ($answer{$what} // die "no such question\n")->(@args) };
    my $why = $@; chomp $why;
    print defined $said ? "$tag ok $said\n" : "$tag error $why\n";
}
