// A server of lines: adds up the numbers that it is sent, each once and in order.   java Lines.java PORT
import java.io.*;
import java.net.*;

public class Lines {
    static long last = 0, sum = 0;

    static synchronized String add(long number) {
        if (number == last + 1) { last = number; sum = (sum * 31 + number) % 1000003; }
        return last + " " + sum + "\n";
    }

    public static void main(String[] arguments) throws IOException {
        ServerSocket server = new ServerSocket(Integer.parseInt(arguments[0]), 50, InetAddress.getByName("0.0.0.0"));
        while (true) {
            Socket socket;
            try { socket = server.accept(); } catch (IOException e) { continue; }
            new Thread(() -> {
                try (socket) {
                    BufferedReader in = new BufferedReader(new InputStreamReader(socket.getInputStream()));
                    for (String line; (line = in.readLine()) != null; )
                        socket.getOutputStream().write(add(Long.parseLong(line)).getBytes());
                } catch (IOException e) { /* the client has gone */ }
            }).start();
        }
    }
}
